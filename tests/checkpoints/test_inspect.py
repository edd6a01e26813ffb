"""What --inspect says of every kind of source."""

import numpy as np
import pytest
import tiny

from omnifusion_jax.checkpoints.inspect import inspect, lines
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.storage import weights
from omnifusion_jax.errors import CheckpointError


def told(source, **options):
    return "\n".join(lines(*inspect(source, **options)))


def test_an_original_directory():
    text = told("omnifusion-tiny")
    assert text.startswith("format           omnifusion\n")
    parts = [line.split() for line in text.splitlines() if " parameters " in line]
    assert [(name, count, size, kind) for name, count, _, size, _, kind in parts] == [
        ("decoder", "1,005,696", "2,011,392", "bfloat16"),
        ("image/encoders/0", "1,095,040", "2,190,080", "bfloat16"),
        ("image/adapter", "148,992", "297,984", "bfloat16"),
        ("special", "512", "1,024", "bfloat16"),
    ]
    assert [line.split()[0] for line in text.splitlines()[1:7]] == [
        "preset",
        "image",
        "image.encoders.0",
        "image.adapter",
        "decoder",
        "layout",
    ]
    assert (
        "\nimage            token='<image>' fit='crop' " in text
        and "\nimage.adapter    kind='transformer' " in text
    )
    row = (
        "decoder/layers/feed_forward/up/kernel             {} [4, 128, 384]            "
        "<- model.layers.{{}}.mlp.up_proj.weight"
    ).format
    assert row("bfloat16") in text
    other = told("omnifusion-tiny", dtype="float32")
    assert row("float32 ") in other


def test_a_native_directory_of_some_parts(tmp_path):
    c = tiny.config()
    save_native(tmp_path / "half", c, tiny.arrays(c, "image/adapter", "special"))
    text = told(tmp_path / "half")
    assert (
        text.startswith("format           native\n")
        and "<- arrays/image/adapter/linear/kernel" in text
        and "decoder/" not in text
    )


def test_a_vision_tower_and_a_language_model(tmp_path):
    assert told("omnifusion-tiny-encoder").startswith(
        "format           clip\nencoder          kind='vit' image_size=96"
    )
    directory = load_checkpoint("omnifusion-tiny").tokenizer.parent / "tuned-model"
    text = told(directory)
    assert (
        text.startswith("format           mistral\ndecoder          family='mistral'")
        and "1,005,696 parameters" in text
    )


class Unreadable:
    """A tensor whose values cannot be had."""

    def __init__(self, a):
        self.shape, self.dtype, self.ndim, self.size, self.nbytes = a.shape, a.dtype, a.ndim, a.size, a.nbytes

    def __len__(self):
        return self.shape[0]

    def __array__(self, *_, **__):
        raise AssertionError("values were read")

    __getitem__ = __array__


def test_nothing_is_read(tmp_path, monkeypatch):
    """Neither from the tensors of other formats, nor from the chunks of a native directory."""
    c, read = tiny.config(), weights.read_safetensors
    save_native(tmp_path / "native", c, tiny.arrays(c))
    for chunk in (tmp_path / "native/arrays").glob("*/[0-9]*"):
        chunk.unlink()
    assert "special/user " in told(tmp_path / "native")
    with pytest.raises(CheckpointError, match="cannot be read"):
        np.asarray(inspect(tmp_path / "native")[2]["special/user"])
    monkeypatch.setattr(
        weights, "read_safetensors", lambda path: {name: Unreadable(a) for name, a in read(path).items()}
    )
    assert "special/user " in told("omnifusion-tiny")
    with pytest.raises(AssertionError, match="values were read"):
        np.asarray(inspect("omnifusion-tiny")[2]["special/user"])


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="a checkpoint of no known format"):
        told(tmp_path)
