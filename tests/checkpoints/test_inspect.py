"""What --inspect says of every kind of source."""

import numpy as np
import pytest
import tiny

from omnifusion_jax.checkpoints.inspect import inspect, lines
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.errors import CheckpointError


def told(source, **options):
    return "\n".join(lines(*inspect(source, **options)))


def test_an_original_directory():
    text = told("omnifusion-tiny")
    assert text.startswith("format      omnifusion\n") and "adapter            148,992 parameters         297,984 bytes  bfloat16" in text
    assert "decoder/layers/up                       bfloat16 [4, 128, 384]            <- model.layers.{}.mlp.up_proj.weight" in text


def test_a_native_directory_of_some_parts(tmp_path):
    c = tiny.config()
    save_native(tmp_path / "half", c, tiny.arrays(c, "adapter", "special"))
    text = told(tmp_path / "half")
    assert text.startswith("format      native\n") and "<- arrays/adapter/linear" in text and "decoder/" not in text


def test_a_vision_tower_and_a_language_model(tmp_path):
    assert told("omnifusion-tiny-encoder").startswith("format      clip\nencoder     image_size=96")
    directory = load_checkpoint("omnifusion-tiny").tokenizer.parent / "tuned-model"
    text = told(directory)
    assert text.startswith("format      mistral\ndecoder     model_type='mistral'") and "1,005,696 parameters" in text


def test_nothing_is_read(tmp_path, monkeypatch):
    """Not even from a file whose values cannot be had."""
    monkeypatch.setattr(np.memmap, "__getitem__", lambda *_: pytest.fail("values were read"), raising=False)
    assert "special/user" in told("omnifusion-tiny")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="a checkpoint of no known format"):
        told(tmp_path)
