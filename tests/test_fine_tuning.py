"""MiniCPM-V and OmniLMM learn from data in MiniCPM-V's form, with the shipped configs, at tiny size."""

import base64
import dataclasses
import json

import jax
import numpy as np
import omnilmm_models as published
import pytest
import tiny
from PIL import Image

import omnifusion_jax as of
from omnifusion_jax import shipped
from omnifusion_jax.checkpoints.native import open_native, read
from omnifusion_jax.config import MeshConfig
from omnifusion_jax.data.check import Check
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError

SYSTEMS = {"minicpmv": "minicpm-v-2.0", "omnilmm": "omnilmm"}
COLOURS = ("red", "green", "blue", "white")
SIZES = ((90, 45), (50, 34), (48, 48), (30, 60))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, dialogues about them in MiniCPM-V's form and LLaVA's, and both systems as native models."""
    folder = tmp_path_factory.mktemp("data")
    ours, llavas = [], []
    for i, (colour, size) in enumerate(zip(COLOURS, SIZES, strict=True)):
        Image.new("RGB", size, colour).save(folder / f"{i}.png")
        other = (i + 1) % 4
        asked = "<image_01>\nIs it like <image_00>?"
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": f"no, {colour}"}]
        ours.append({"id": i, "image": {"<image_00>": f"{other}.png", "<image_01>": f"{i}.png"}})
        ours[-1]["conversations"] = said
        said = [{"from": "human", "value": "<image>\nIs it like <image>?"}]
        said += [{"from": "gpt", "value": f"no, {colour}"}]
        llavas.append({"id": i, "image": [f"{i}.png", f"{other}.png"], "conversations": said})
    (folder / "ours.json").write_text(json.dumps(ours))
    (folder / "llavas.json").write_text(json.dumps(llavas))
    for name, system in SYSTEMS.items():
        published.save(published.Whole(system), folder / f"{name}-public")
        of.convert(folder / f"{name}-public", folder / name)
    return folder


def config(folder, source):
    """The shipped config with a tiny model, and a learning rate that shows in a few steps."""
    c = shipped.load(source)
    c.init_from = str(folder / source.split(":")[0])
    c.model, c.mesh = open_native(c.init_from)[0], MeshConfig(fsdp=1)
    c.steps, c.batch_size, c.log_every, c.compute_dtype = 6, 4, 1, "float32"
    c.optimizer = dataclasses.replace(c.optimizer, learning_rate=5e-3, warmup=0.0)
    c.data.path, c.data.images, c.data.num_workers, c.data.check = (
        str(folder / "ours.json"),
        str(folder),
        0,
        "off",
    )
    c.data.max_length = 256
    return c


@pytest.mark.parametrize("source", ["minicpmv:lora", "omnilmm:frozen"])
def test_it_learns_what_its_table_says(folder, tmp_path, source):
    c = config(folder, source)
    of.train(c, tmp_path)
    losses = tiny.losses(tmp_path)
    assert losses[-1] < losses[0] / 2
    before = {path: np.asarray(a) for path, a in open_native(c.init_from)[1].items()}
    after = {path: np.asarray(a) for path, a in open_native(tmp_path / "model")[1].items()}
    same = {path for path, a in before.items() if path not in after or np.array_equal(a, after[path])}
    tower = {path for path in before if path.startswith("image/encoders/")}
    if source == "omnilmm:frozen":
        assert same == tower
        return
    changed = {path for path in before if path.startswith("decoder/")} - same
    kernels = {f"decoder/layers/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert changed == {"decoder/embed"} | kernels
    assert not tower & same and "image/adapter/queries" not in same


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_batch_is_that_of_llavas_records(folder, name):
    """Of the same pictures at the same places, with the same targets."""
    c = config(folder, name)
    tokenizer = Tokenizer(read(c.init_from)[2]).for_vocabulary(c.model.decoder.vocab)
    prepare = Prepare.of(tokenizer, c.model, 256)
    made = [
        next(
            Batches(
                open_source(str(folder / file), str(folder), 1),
                prepare,
                batch_size=4,
                length=256,
                tiles=prepare.tiles,
                seed=0,
            )
        )
        for file in ("ours.json", "llavas.json")
    ]
    ours, llavas = (jax.tree.leaves(batch) for batch in made)
    assert len(ours) == len(llavas) and (made[0].weights > 0).any()
    for a, b in zip(ours, llavas, strict=True):
        np.testing.assert_array_equal(a, b)


def data_url(data):
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_what_cannot_be_used_is_counted_by_its_reason(folder):
    """The other records are read all the same."""
    c = config(folder, "minicpmv")
    tokenizer = Tokenizer(read(c.init_from)[2]).for_vocabulary(c.model.decoder.vocab)
    Image.new("RGB", (400, 1)).save(folder / "strip.png")  # one slice of it has more patches than the budget
    said = [{"role": "user", "content": "<image_00>?"}, {"role": "assistant", "content": "no"}]
    named = lambda image: {"image": image, "conversations": said}
    pair = {"images": ["0.png"], "question": "What?", "chosen": "a cat", "rejected": "a dog"}
    bad = {
        "size": named({"<image_00>": "strip.png"}),
        "marks": named({"<image_01>": "0.png"}),
        "not_a_picture": named({"<image_00>": data_url(b"no picture")}),
        "data_url": named({"<image_00>": "data:image/png;base64,%%%"}),
        "same": pair | {"rejected": "a cat"},
        "empty_side": pair | {"chosen": " "},
        "no_pair": named({"<image_00>": "0.png"}),
    }
    (folder / "bad.json").write_text(json.dumps([*bad.values(), pair]))
    source = open_source(str(folder / "bad.json"), str(folder), 1)
    prepare = Prepare.of(tokenizer, c.model, 256, pairs=True)
    for i, reason in enumerate(bad):
        with pytest.raises(DataError) as caught:
            prepare.outlined()(source[i])
        assert caught.value.reason == reason, caught.value
        assert str(caught.value).startswith(f"{folder}/bad.json[{i}]: ")
    report = Check(source, prepare, 1).wait()
    assert (report.checked, report.bad, len(report.reasons)) == (len(bad) + 1, len(bad), len(bad))
