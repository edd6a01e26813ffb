"""Runs on pairs of answers: the reference that they begin with, and what they learn and log."""

import json
import math

import jax
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from PIL import Image
from pyarrow import parquet
from settings import changed

from omnifusion_jax import run
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.config import DataConfig, LoraConfig, OptimizerConfig, PreferenceConfig, TrainConfig
from omnifusion_jax.data import reference as kept
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.evaluation import reference
from omnifusion_jax.inference.model import Model
from omnifusion_jax.tables import OBJECTIVES

LENGTH = 80
ALL, FACTORS = ((r".*", 1.0),), r"decoder/.*/lora_[ab]"
OVER = ((FACTORS, 1.0), (rf"(image|special)/.*|(?!{FACTORS})decoder/.*", None))
QUESTION = "What is in the picture?"
PAIRS = [
    ("A red circle.", "A blue square."),
    ("Two circles.", "There are two squares."),
    ("To the left.", "It is."),
]
BAD = 4  # the record with the same answer twice


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its tokenizer and 7 pairs, of which one is bad."""
    folder = tmp_path_factory.mktemp("pairs")
    tokenizer = tiny.make_tokenizer(folder / "tokenizer")
    c = tiny.looking("one encoder")
    c.decoder.max_length = 2 * LENGTH
    save_native(folder / "model", c, tiny.arrays(c), tokenizer.directory)
    records = []
    for i in range(7):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        chosen, rejected = PAIRS[i % 3]
        record = {"images": [f"{i}.png"], "question": QUESTION, "chosen": chosen}
        records.append(record | {"rejected": chosen if i == BAD else rejected})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def config(place, **settings):
    c = TrainConfig(
        model=tiny.looking("one encoder"),
        objective="preference",
        init_from=str(place / "model"),
        steps=3,
        batch_size=4,
        compute_dtype="float32",
        log_every=1,
        train_parts=ALL,
        preference=PreferenceConfig(beta=0.5, changed_weight=2.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.0, schedule="constant"),
        data=DataConfig(
            path=str(place / "pairs.jsonl"),
            images=str(place),
            on_bad_sample="skip",
            bad_share=0.2,
            max_length=LENGTH,
            packing=True,
            row_length=2 * LENGTH,
            window=1,
            check="off",
        ),
    )
    c.model.decoder.max_length, c.model.preset = 2 * LENGTH, c.model.filled_from
    c.mesh.fsdp = 1
    return changed(c, settings).validate()


def fit(c, workdir):
    """The lines of metrics of a run."""
    run.train(c, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "train/loss" in row]


@pytest.fixture(scope="module")
def plain(place, tmp_path_factory):
    return fit(config(place), tmp_path_factory.mktemp("plain"))


def test_a_run_begins_as_its_reference_and_learns_what_is_preferred(plain):
    first, last = plain[0], plain[-1]
    assert_allclose(first["train/loss"], math.log(2), rtol=1e-5)
    for name in ("chosen_reward", "rejected_reward", "reward_margin", "kl"):
        assert abs(first[f"train/{name}"]) < 1e-5
    assert last["train/loss"] < 0.95 * math.log(2) and last["train/kl"] > 0
    assert last["train/reward_margin"] > 0.05 and last["train/preference_accuracy"] == 1
    margin = last["train/chosen_reward"] - last["train/rejected_reward"]
    assert_allclose(margin, last["train/reward_margin"], rtol=1e-4)
    assert last["data/skipped"] == 1


def test_only_without_a_term_of_sft_there_is_a_loss_of_knowing_nothing(place):
    """By which a finished run is judged."""
    ignorance = lambda **more: OBJECTIVES["preference"].ignorance(config(place, **more), None)
    assert ignorance() == math.log(2) and ignorance(**{"preference.sft": 0.1}) == math.inf


def test_lengths_are_those_of_the_answers(place, plain):
    tokenizer = run.Tokenizer(place / "tokenizer")
    lengths = [[len(tokenizer.encode(text)) + 1 for text in pair] for pair in PAIRS]
    for row in plain:
        for column, name in enumerate(("chosen_tokens", "rejected_tokens")):
            found = row[f"train/{name}"]
            assert min(one[column] for one in lengths) <= found <= max(one[column] for one in lengths)


def test_no_portion_or_device_parts_a_pair(place, plain, tmp_path):
    spread = {"grad_accum": 2, "mesh.data": 2, "mesh.tensor": 2, "remat": "full"}
    for ours, theirs in zip(fit(config(place, **spread), tmp_path / "run"), plain, strict=True):
        for name in ("loss", "reward_margin", "kl", "chosen_tokens"):
            assert_allclose(ours[f"train/{name}"], theirs[f"train/{name}"], rtol=2e-3, atol=2e-6)


def test_packed_pairs_learn_with_factors(place, tmp_path):
    lora = {"lora": LoraConfig(rank=2, alpha=4.0), "train_parts": OVER}
    packed = {"batch_size": 1, "data.window": 6, "data.row_length": 8 * LENGTH, "steps": 6}
    rows = fit(config(place, **lora, **packed), tmp_path / "run")
    assert_allclose(rows[0]["train/loss"], math.log(2), rtol=1e-5)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] and rows[-1]["train/images_per_s"] > 0


def start(c):
    """What `begin` is given."""
    arrays, tokenizer = run.starting_point(c)
    return run.Tokenizer(tokenizer), lambda: run.whole(c, arrays)


@pytest.fixture
def small(monkeypatch):
    """Files of 3 records each."""
    monkeypatch.setattr(kept, "PART", 3)
    monkeypatch.setattr(reference, "PART", 3)


def test_the_reference_says_what_the_model_says(place, tmp_path, small):
    c = config(place, **{"preference.reference": str(tmp_path / "reference")})
    tokenizer, arrays = start(c)
    OBJECTIVES["preference"].begin(c, tokenizer, arrays)
    files = sorted((tmp_path / "reference").glob("*.parquet"))
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    assert [row["record"] for row in rows] == [i for i in range(7) if i != BAD] and len(files) == 3
    model = Model(c.model, arrays(), tokenizer)
    for row in rows:
        for name, text in zip(("chosen", "rejected"), PAIRS[row["record"] % 3], strict=True):
            talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]
            (logits,) = model.logits(Request(talk, [str(place / f"{row['record']}.png")]))
            ids = [*tokenizer.encode(text), tokenizer.eos]
            scores = np.asarray(jax.nn.log_softmax(logits[-len(ids) - 1 : -1]))
            expected = scores[np.arange(len(ids)), ids]
            assert_allclose(row[name], expected, rtol=1e-4, atol=1e-4)
            assert_allclose(row[f"{name}_sum"], expected.sum(), rtol=1e-4)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    files[1].unlink()
    (tmp_path / "reference/00001.parquet.new").write_bytes(b"cut off")
    OBJECTIVES["preference"].begin(c, tokenizer, arrays)
    after = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    assert {name: data for name, (data, _) in after.items()} == {
        name: data for name, (data, _) in before.items()
    }
    assert [after[name][1] == before[name][1] for name in sorted(after)] == [True, False, True]


@pytest.fixture(scope="module")
def made(place, plain):
    """The reference that the first run left beside its data."""
    return place / "pairs.jsonl.reference"


def test_another_reference_is_refused_with_what_differs(place, made, tmp_path):
    c = config(place)
    tokenizer, arrays = start(c)
    begin = lambda c, arrays: OBJECTIVES["preference"].begin(c, tokenizer, arrays)
    begin(c, arrays)  # its own is taken
    manifest = made / kept.MANIFEST
    then = json.loads(manifest.read_text())
    del then["model"]["user"]  # as if the field had come since
    manifest.write_text(json.dumps(then))
    begin(c, arrays)
    other = lambda: {path: a + (path == "decoder/head") for path, a in arrays().items()}
    for call, message in (
        (
            lambda: begin(c, other),
            r"another reference .*: weights '\w+', now '\w+'. Delete it, or name another",
        ),
        (lambda: begin(changed(c, {"model.prompt": "No."}), arrays), r"model.prompt .*, now 'No.'"),
        (lambda: begin(changed(c, {"data.max_length": 60}), arrays), "reading.max_length 80, now 60"),
        (lambda: begin(changed(c, {"data.draft": True}), arrays), "reading.draft False, now True"),
        (lambda: begin(changed(c, {"compute_dtype": "bfloat16"}), arrays), "compute_dtype 'float32'"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    tokenizer.digest = "another"
    with pytest.raises(ConfigError, match=r"tokenizer '\w+', now 'another'"):
        begin(c, arrays)


def test_a_model_that_is_not_whole_has_no_reference(place, tmp_path):
    c = config(place, **{"preference.reference": str(tmp_path / "reference")})
    tokenizer, arrays = start(c)
    part = lambda: {path: a for path, a in arrays().items() if path != "decoder/head"}
    with pytest.raises(
        ConfigError, match=r"decoder/head would be drawn at random. Give init_from a whole model"
    ):
        OBJECTIVES["preference"].begin(c, tokenizer, part)
    assert not (tmp_path / "reference").exists()


def test_a_record_that_the_reference_lacks_or_read_otherwise_is_bad(place, made):
    c, record = config(place), 2
    data = OBJECTIVES["preference"].reading(c, run.Tokenizer(place / "tokenizer"))
    prepare = kept.PrepareReferred(data.prepare, kept.Reference(made))
    sample = prepare((record, data.source[record]))
    assert (sample.extra["reference"][sample.weights > 0] < 0).all()
    assert not sample.extra["reference"][sample.weights == 0].any()
    others = sample._replace(weights=np.roll(sample.weights, 1))  # as if other labels were learned
    assert kept.digest(others) != kept.digest(sample)
    with pytest.raises(
        DataError, match=r"pairs.jsonl:3: the reference could not read it. If the data"
    ) as error:
        prepare((BAD, data.source[record]))
    assert error.value.reason == "reference"
    with pytest.raises(DataError, match="the reference read it with other tokens"):
        prepare((record + 1, data.source[record]))
    with pytest.raises(DataError, match="chosen and rejected are the same"):
        prepare((BAD, data.source[BAD]))
    with pytest.raises(DataError, match="there are no log-likelihoods of a reference"):
        kept.Reference(place)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data.packing": False, "data.row_length": 0}, "set data.packing=True"),
        ({"data.path": "nowhere.jsonl"}, "Name a folder for the reference's log-likelihoods"),
        ({"eval.path": "pairs.jsonl", "eval.loss": True}, "eval.loss is that of answers"),
    ],
)
def test_settings_that_cannot_work_are_refused(place, settings, message):
    c, objective = config(place, **settings), OBJECTIVES["preference"]
    with pytest.raises(ConfigError, match=message):
        objective.evaluator(c, None)
        objective.begin(c, run.Tokenizer(place / "tokenizer"), dict)
