"""Features made beforehand: the same losses as from pictures, and refusals of what they are not."""

import contextlib
import copy
import json
import shutil

import jax
import msgpack
import numpy as np
import pytest
import runs
import tiny
from conftest import run_command
from settings import changed
from talks import picture, talk, write

import omnifusion_jax as of
from omnifusion_jax import sharding, shipped
from omnifusion_jax.checkpoints.native import open_native
from omnifusion_jax.config import adapter
from omnifusion_jax.data.features import Features, unlike
from omnifusion_jax.data.images import fit, open_image
from omnifusion_jax.data.prepared.features import FeatureShards
from omnifusion_jax.data.prepared.folder import prepare_files
from omnifusion_jax.data.prepared.plan import planned
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError, DataError, OmniFusionError
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.planning.programs import train_step
from omnifusion_jax.run import completed, parted, starting_point
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import features
from omnifusion_jax.training.program import make_program
from omnifusion_jax.training.start import begin, starting, streams
from omnifusion_jax.training.step import batch_sharding

COUNT = 10


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A data file of dialogues with one picture, two, or none, and a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("data")
    records = [talk(i, image=f"{i}.png", answer="a cat" + " or two" * (i % 3)) for i in range(COUNT)]
    for i in range(COUNT):
        picture(folder / f"{i}.png", width=30 + i, seed=i)
    two = {"image": ["1.png", "2.png"], "conversations": copy.deepcopy(records[3]["conversations"])}
    two["conversations"][0]["value"] = "<image>\n<image>\nWhich?"
    records[3], records[5] = two, talk(5)
    write(folder, records)
    tiny.make_tokenizer(folder / "tokenizer")
    return folder


def config(pictures, encoders=1, packing=False):
    c = runs.config(steps=3, batch_size=4, train_parts=runs.PHASE1)
    c.tokenizer = str(pictures / "tokenizer")
    c.data.path, c.data.images, c.data.check = str(pictures / "d.jsonl"), str(pictures), "off"
    c.data.packing, c.data.row_length = packing, 2 * runs.LENGTH if packing else 0
    if encoders == 2:
        c.model.image.encoders += (tiny.SECOND,)
        c.model.image.adapter = adapter("concat", heads=2, mlp=48, dropout=0.0)
    return c.validate()


def prepare(c, output, **options):
    make, settings = features.feature_shards(c, starting_point(c)[0], c.data.max_pixels)
    source = open_source(c.data.path, c.data.images, 0)
    plan = planned(source, c.data.path, c.data.images, shard_records=4, **settings)
    prepare_files(source, output, plan, workers=2, skip=False, features=make, **options)
    return changed(c, {"data.path": str(output), "data.images": ""})


@pytest.fixture(scope="module")
def prepared(pictures, tmp_path_factory):
    return prepare(config(pictures), tmp_path_factory.mktemp("features") / "out")


def trained(c):
    """(the metrics of three steps by name, the paths of what is frozen)"""
    found, tokenizer = starting_point(c)
    tokenizer = Tokenizer(tokenizer).for_vocabulary(c.model.decoder.vocab)
    mesh, steps = sharding.make_mesh(**vars(c.mesh)), []
    with contextlib.closing(OBJECTIVES["answers"].batches(c, tokenizer)) as batches:
        given, _ = parted(c, found, batches.features)
        program = make_program(c, mesh, features=streams(batches))
        start, frozen = starting(c, mesh, given, streams(batches))
        state = begin(program, start)
        with jax.set_mesh(mesh):
            for _ in range(3):
                batch = jax.device_put(next(batches), batch_sharding(mesh))
                state, metrics = program.step(state, frozen, batch)
                steps.append(jax.device_get(metrics))
    return {name: [one[name] for one in steps] for name in steps[0]}, set(frozen)


@pytest.fixture(scope="module")
def from_pictures(pictures):
    return trained(config(pictures))


def test_losses_are_those_from_pictures(from_pictures, prepared):
    """By a step without encoders, of which none are counted as work done."""
    (expected, everything), (found, frozen) = from_pictures, trained(prepared)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=1e-6)
    assert {path for path in everything - frozen if path.startswith("image/encoders/")} == everything - frozen
    assert everything - frozen
    assert not any(found["flops/encoder"]) and all(expected["flops/encoder"])
    for part in ("adapter", "decoder", "head"):
        assert found[f"flops/{part}"] == expected[f"flops/{part}"]


def test_a_run_from_features(from_pictures, prepared, tmp_path, capsys):
    """As a user starts it: the same losses, also when it goes on, and a whole model at its end."""
    workdir = tmp_path / "run"
    c = changed(prepared, {"checkpoint.every_steps": 1, "checkpoint.final": "complete"})
    c.model.preset = c.model.filled_from  # that of tiny.py has a name of its own
    of.train(c, workdir)
    lines = runs.rows(workdir)
    losses = [line["train/loss"] for line in lines]
    np.testing.assert_allclose(losses, from_pictures[0]["loss"], rtol=1e-6)
    assert "left out image/encoders: the data hold what they would make" in capsys.readouterr().out
    _, stored = open_native(workdir / "model")
    given = features.encoder_arrays(c, {})
    assert given and all(np.array_equal(stored[path], a) for path, a in given.items())
    shutil.rmtree(workdir / "checkpoints" / "3")
    of.train(c, workdir)
    assert "resuming from step 2" in capsys.readouterr().out
    assert [line["train/loss"] for line in runs.rows(workdir)] == losses
    with pytest.raises(ConfigError, match=r"the data holds features of another encoder .*weights"):
        of.train(changed(c, {"seed": 1}), tmp_path / "other")


def test_the_command_makes_what_its_config_trains_on(pictures, tmp_path):
    """With the settings typed beside it, and no others."""
    output = tmp_path / "out"
    given = f"--data={pictures / 'd.jsonl'}", f"--images={pictures}", f"--output={output}"
    flags = "--features=tiny:pretrain", "--config.data.draft=true", "--max_pixels=1100"
    said = run_command("prepare_data", *given, *flags, "--on_bad_sample=skip")
    # pictures have 30 * (30 + i) pixels; one record has two of them, and one has none
    assert f"{output}: 7 records, features of 7 image files, " in said and "3 left out: size" in said
    c = completed(changed(shipped.load("tiny:pretrain"), {"data.path": str(output), "data.draft": True}))
    made = open_source(str(output), "", 0, features=True).made_by
    features.same_features(c, starting_point(c)[0], made)
    with pytest.raises(ConfigError, match="draft True, now False"):
        features.same_features(changed(c, {"data.draft": False}), starting_point(c)[0], made)


def test_a_plan_knows_features(prepared):
    """The step that a run compiles, for four rows with the features of a picture each."""
    work = train_step(prepared, sharding.make_mesh(**vars(prepared.mesh)))
    [views] = work.held["features"].values()
    assert [view.shape for view in views] == [(1, 4, 9, 32)]
    assert {"image/adapter", "decoder", "head"} == set(work.flops)
    assert not any("encoders" in path for path in work.held["parameters"][1])
    with jax.set_mesh(work.mesh):
        work.lower()


@pytest.mark.sweep
def test_losses_of_two_encoders_in_packed_rows(pictures, tmp_path):
    c = config(pictures, encoders=2, packing=True)
    found, expected = (trained(one)[0]["loss"] for one in (prepare(c, tmp_path / "out"), c))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_file_holds_what_the_encoder_gives(pictures, prepared):
    """Without a batch, and read with nothing but msgpack and NumPy."""
    c = prepared.model.image.encoders[0]
    arrays = features.encoder_arrays(prepared, {})
    own = {path.removeprefix("image/encoders/0/"): a for path, a in arrays.items()}
    encoder = nnx.with_parameters(nnx.eval_shape(lambda: VisionTransformer(c, rngs=nnx.Rngs(0))), own)
    found = open_source(prepared.data.path, "", 0, features=True)
    [item] = found[0].images
    assert isinstance(item, Features) and len(found[3].images) == 2 and found[5].images == ()
    order, [data] = msgpack.unpackb(item)
    pixels = fit(open_image(pictures / "0.png"), c.image_size, "crop", shortest=c.image_size)
    expected = np.asarray(encoder(pixels[None]))
    np.testing.assert_allclose(np.frombuffer(data, "f4").reshape(expected.shape), expected, atol=2e-6)
    assert np.array_equal(np.frombuffer(order, "<i4"), np.arange(9))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"seed": 1}, r"streams\.image\.encoders\.0\.weights '\w+', now '\w+'"),
        ({"model.image.encoders[0].feature_layer": -1}, r"encoders\.0\.feature_layer -2, now -1"),
        ({"model.image.fit": "pad"}, r"streams\.image\.fit 'crop', now 'pad'"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype 'float32', now 'bfloat16'"),
        ({"data.draft": True}, "draft False, now True"),
        ({"train_parts": ((".*", 1.0),)}, "stay as they are, and train_parts trains image/encoders/0/"),
    ],
)
def test_other_encoders_are_refused(prepared, settings, named):
    c = changed(prepared, settings)
    made = open_source(c.data.path, "", 0, features=True).made_by
    with pytest.raises(ConfigError, match=named):
        features.same_features(c, {}, made)


def test_a_setting_that_one_side_lacks_differs():
    one, two = ({"streams": {"image": {"encoders": [{"width": 8}] * n}}} for n in (2, 1))
    assert unlike(one, two) == ["streams.image.encoders.1.width 8, now None"]
    assert unlike(two, one) == ["streams.image.encoders.1.width None, now 8"]
    assert unlike(one, one) == []


def test_pictures_are_decoded_as_the_config_says(pictures):
    for draft in (False, True):
        c = changed(config(pictures), {"data.draft": draft})
        make, _ = features.feature_shards(c, starting_point(c)[0], 123456)
        media = make.keywords["processors"]["image"].like
        assert media.draft == draft and media.max_pixels == 123456


def test_a_picture_that_cannot_be_read_is_named_with_its_record(pictures, tmp_path):
    write(tmp_path, [talk(i, image=f"{i}.png") for i in range(2)])
    whole = (pictures / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole)
    (tmp_path / "1.png").write_bytes(whole[:-40])
    shutil.copytree(pictures / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(DataError, match=r"d\.jsonl:2\b.*1\.png"):
        prepare(config(tmp_path), tmp_path / "out")


def test_a_disk_without_room_ends_the_preparation(pictures, tmp_path, monkeypatch):
    full = OmniFusionError("0.array_record cannot be written: no space left on device")
    monkeypatch.setattr(FeatureShards, "__call__", lambda self, part: full)
    with pytest.raises(OmniFusionError, match="no space left"):
        prepare(config(pictures), tmp_path / "out")


def test_an_adapter_of_all_layers_is_refused(pictures):
    c = config(pictures, encoders=2)
    c.model.image.adapter = adapter("sum", width=16)
    with pytest.raises(ConfigError, match=r"hidden states of all layers .* Train it from pictures"):
        features.made_by(c, {})


def test_where_pictures_are_needed_features_are_refused(prepared):
    with pytest.raises(DataError, match=r"holds features, and pictures are needed here.*d\.jsonl"):
        open_source(prepared.data.path, "", 0)


def test_what_was_cut_off_goes_on(pictures, prepared, tmp_path):
    """With the same bytes; and with no other encoder."""
    c, output = config(pictures), tmp_path / "out"
    steps = []

    def cut(records):
        steps.append(records)
        if len(steps) == 2:
            raise OmniFusionError("cut")

    with pytest.raises(OmniFusionError, match="cut"):
        prepare(c, output, advance=cut)
    before = {file: file.stat().st_mtime_ns for file in output.glob("*.array_record")}
    assert len(before) == 2
    with pytest.raises(DataError, match=r"made from something else: .*weights"):
        prepare(changed(c, {"seed": 1}), output)
    prepare(c, output, advance=steps.append)
    assert steps == [4, 4, 4, 4, 2] and all(file.stat().st_mtime_ns == at for file, at in before.items())
    whole = open_source(prepared.data.path, "", 0, features=True)
    assert json.loads((output / "dataset.json").read_text())["fingerprint"] == whole.fingerprint
