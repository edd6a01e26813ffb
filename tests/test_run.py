"""`train` around its loop: what a run starts from, asks and leaves behind. Nothing is trained."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from settings import changed

import omnifusion_jax as of
from omnifusion_jax import shipped
from omnifusion_jax.checkpoints.load import load_checkpoint, load_tokenizer
from omnifusion_jax.checkpoints.native import open_native, save_native
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.config import adapter, part_of
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.run import save_model, starting_point
from omnifusion_jax.tables import OBJECTIVES

DECODER = locate("omnifusion-tiny-decoder")
PHASE_ONE, ALL = {"image/adapter", "special"}, {"image/encoders/0", "image/adapter", "special", "decoder"}


@pytest.fixture(scope="module")
def bundled():
    found = load_checkpoint("omnifusion-tiny", dtype="float32")
    return found, {path: np.asarray(a) for path, a in found.arrays.items()}


@pytest.fixture(scope="module")
def phase_one(bundled, tmp_path_factory):
    """What phase 1 leaves, its values told from others by their sign."""
    found, arrays = bundled
    folder = tmp_path_factory.mktemp("one") / "model"
    c = changed(found.config, {"image.adapter.dropout": 0.25})
    save_native(
        folder,
        c,
        {path: -a for path, a in arrays.items() if path.startswith(("image/adapter/", "special/"))},
        DECODER,
    )
    return folder


def test_phase_two_starts_from_its_parts_and_phase_one(bundled, phase_one):
    """Other rates of dropout and longest sequences are no other model."""
    config = changed(shipped.load("tiny:sft"), {"init_from": str(phase_one), "model.decoder.max_length": 128})
    arrays, tokenizer = starting_point(config)
    _, expected = bundled
    assert set(map(part_of, arrays)) == ALL
    assert (
        tokenizer == load_tokenizer(config) == DECODER
    )  # of the decoder's parts_from, before that of init_from
    np.testing.assert_array_equal(
        arrays["image/adapter/linear/kernel"], -expected["image/adapter/linear/kernel"]
    )
    np.testing.assert_array_equal(arrays["image/encoders/0/position"], expected["image/encoders/0/position"])


@pytest.mark.parametrize("part", ["image/adapter", "special", "image/encoders/1", "encoder", "decoder/embed"])
def test_a_part_that_comes_from_no_checkpoint_of_its_own(part):
    config = changed(shipped.load("tiny:sft"), {"parts_from": {part: "omnifusion-tiny"}})
    with pytest.raises(
        of.ConfigError, match=f"parts_from names '{part}'; .* is one of image/encoders/0, decoder$"
    ):
        starting_point(config)


def test_every_encoder_may_come_from_a_checkpoint_of_its_own():
    """From that of one encoder the first, wherever it goes."""
    config = shipped.load("tiny:pretrain")
    [first] = config.model.image.encoders
    second = dataclasses.replace(first, image_size=128, position_grid=6)  # which a model may choose
    values = {"model.image.encoders": (first, second), "model.image.adapter": adapter("sum")}
    config = changed(
        config, values | {"parts_from": {f"image/encoders/{i}": "omnifusion-tiny-encoder" for i in (0, 1)}}
    )
    config.tokenizer = str(DECODER)
    arrays, _ = starting_point(config)
    assert set(map(part_of, arrays)) == {"image/encoders/0", "image/encoders/1"}
    np.testing.assert_array_equal(arrays["image/encoders/0/position"], arrays["image/encoders/1/position"])
    config = changed(config, {"model.image.encoders[1].mlp": 256})
    with pytest.raises(of.ConfigError, match=r"--config\.model\.image\.encoders\.1\.mlp=512$"):
        starting_point(config)


def test_an_adapter_of_another_kind_than_that_of_phase_one_is_refused(phase_one):
    config = changed(
        shipped.load("tiny:sft"),
        {"init_from": str(phase_one), "model.image.adapter": adapter("mlp", mlp=256)},
    )
    with pytest.raises(
        of.ConfigError,
        match=r"To take them over: --config\.model\.image\.adapter\.kind=transformer --config.*\.heads=4",
    ):
        starting_point(config)
    second = {"model.image.encoders": config.model.image.encoders * 2, "model.image.adapter": adapter("sum")}
    with pytest.raises(of.ConfigError, match=r"has no model\.image\.encoders\.1, the config has one"):
        starting_point(changed(config, second))


def test_a_tokenizer_that_is_named_comes_first(phase_one, tmp_path):
    named = changed(shipped.load("tiny:sft"), {"init_from": str(phase_one), "tokenizer": str(tmp_path)})
    assert starting_point(named)[1] == load_tokenizer(named) == tmp_path
    alone = changed(
        shipped.load("tiny:sft"),
        {"init_from": str(phase_one), "parts_from": {"image/encoders/0": "omnifusion-tiny-encoder"}},
    )
    assert starting_point(alone)[1] == load_tokenizer(alone) == phase_one
    none = changed(alone, {"init_from": None})
    with pytest.raises(of.ConfigError, match=r"no tokenizer: set parts_from\.decoder"):
        starting_point(none)
    with pytest.raises(of.ConfigError, match=r"no tokenizer: set parts_from\.decoder"):
        load_tokenizer(none)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.decoder.rope_theta": 1e6}, "--config.model.decoder.rope_theta=10000.0"),
        ({"model.image.adapter.heads": 2}, "--config.model.image.adapter.heads=4"),
        ({"model.image.encoders[0].eps": 1e-6}, "--config.model.image.encoders.0.eps=1e-05"),
    ],
)
def test_another_model_than_that_of_the_files_is_refused(phase_one, values, message):
    config = changed(shipped.load("tiny:sft"), {"init_from": str(phase_one), **values})
    with pytest.raises(of.ConfigError, match=message):
        starting_point(config)


@pytest.mark.parametrize(
    ("final", "parts", "kind"), [("trained", PHASE_ONE, jnp.float32), ("complete", ALL, jnp.bfloat16)]
)
def test_what_a_run_leaves(bundled, tmp_path, final, parts, kind):
    """The trained parts in float32, or the whole model as it computes; never the head of a bare encoder."""
    _, arrays = bundled
    config = changed(shipped.load("tiny:pretrain"), {"checkpoint.final": final, "compute_dtype": "bfloat16"})
    trained = {path: a for path, a in arrays.items() if path.startswith(("image/adapter/", "special/"))}
    frozen = {path: a for path, a in arrays.items() if path not in trained}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "earlier").write_text("of a shorter run")
    save_model(config, tmp_path / "model", {**trained, "head": np.zeros((2, 2), np.float32)}, frozen, DECODER)
    _, written = open_native(tmp_path / "model")
    assert set(map(part_of, written)) == parts
    assert {a.dtype for a in written.values()} == {jnp.dtype(kind)}
    assert not (tmp_path / "model" / "earlier").exists() and not (tmp_path / "model.new").exists()


@pytest.mark.parametrize("check", ["first_epoch", "off"])
def test_no_check_begins_before_something_is_read(tmp_path, check):
    """A run that is finished or was checked reads nothing, and starts no process."""
    (tmp_path / "d.json").write_text(
        json.dumps(
            [{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}]
            * 8
        )
    )
    values = {"data.path": str(tmp_path / "d.json"), "data.check": check, "batch_size": 8}
    batches = OBJECTIVES["answers"].batches(
        changed(shipped.load("tiny:sft"), values), Tokenizer(Path(DECODER))
    )
    assert batches.check is None
    next(batches)
    assert (batches.check is None) == (check == "off")
    batches.close()


def test_the_order_of_the_data_follows_from_the_config_s_seed():
    orders = []
    for seed in (0, 1, 1):
        batches = OBJECTIVES["answers"].batches(
            changed(shipped.load("tiny:sft"), {"seed": seed}), Tokenizer(Path(DECODER))
        )
        orders.append([int(batches.order[i]) for i in range(8)])
        batches.close()
    assert orders[0] != orders[1] == orders[2]


def test_pictures_above_the_config_s_limit_are_refused(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nHi."}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "d.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}] * 4))
    values = {
        "data.path": str(tmp_path / "d.json"),
        "data.images": str(tmp_path),
        "data.check": "off",
        "batch_size": 8,
        "data.max_pixels": 1599,
    }
    batches = OBJECTIVES["answers"].batches(
        changed(shipped.load("tiny:sft"), values), Tokenizer(Path(DECODER))
    )
    with pytest.raises(of.DataError, match="40 x 40 pixels; 1 to 1,599"):
        next(batches)
    batches.close()


def test_a_run_is_asked_what_its_config_says(bundled, tmp_path, monkeypatch):
    """Held-out questions, not those of training; so many tokens an answer; blank pictures too."""
    found, arrays = bundled
    records = [
        {
            "id": "a",
            "conversations": [
                {"from": "human", "value": "Describe the picture."},
                {"from": "gpt", "value": "Hello."},
            ],
        }
    ]
    (tmp_path / "held_out.json").write_text(json.dumps(records * 2))
    values = {
        "eval.path": str(tmp_path / "held_out.json"),
        "eval.count": 2,
        "eval.max_new_tokens": 1,
        "eval.blind": True,
        "model": found.config,
    }
    evaluate = OBJECTIVES["answers"].evaluator(
        changed(shipped.load("tiny:sft"), values), Tokenizer(Path(DECODER))
    )
    figures, asked = evaluate(arrays)
    assert figures["questions"] == 2 and "blind_accuracy" in figures
    assert [record.question for record in asked] == ["Describe the picture."] * 2
    tokenizer = Tokenizer(Path(DECODER))
    assert all(len(tokenizer.encode(record.answer)) <= 1 for record in asked)
