"""Models put together from a vision tower and a language model."""

import numpy as np
import pytest
from conftest import run_command

import omnifusion_jax as of
from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder, load_encoder
from omnifusion_jax.checkpoints.parts import from_parts
from omnifusion_jax.config import AdapterConfig, ConfigError
from omnifusion_jax.models.presets import preset

VISION, DECODER = "omnifusion-tiny-encoder", "omnifusion-tiny-decoder"
QUESTION = [{"role": "user", "content": "What is it?"}]


def test_stored_parts_stay_and_the_rest_is_fresh():
    found, fresh = from_parts(DECODER, VISION)
    assert fresh == ("adapter", "special") and found.missing == () and found.config.preset == "parts"
    assert found.config.adapter.kind == "transformer" and found.config.layout == "omnifusion"
    (_, tower), (_, decoder, tokenizer) = load_encoder(VISION), load_decoder(DECODER)
    for path, a in {**tower, **decoder}.items():
        np.testing.assert_array_equal(found.arrays[path], a)
    assert found.tokenizer == tokenizer and {str(a.dtype) for a in found.arrays.values()} == {"bfloat16"}


def test_a_preset_says_how_they_are_joined():
    found, fresh = from_parts(DECODER, VISION, name="llava-1.5-7b", dtype="float32")
    wanted = preset("llava-1.5-7b")
    assert fresh == ("adapter",) and found.config.special == ()
    assert (found.config.template, found.config.image) == (wanted.template, wanted.image)
    assert found.config.adapter == AdapterConfig("mlp", mlp=128)  # as wide as the decoder, as the preset's
    assert found.config.encoder == load_encoder(VISION)[0] and found.config.decoder.vocab == 852
    assert {str(a.dtype) for a in found.arrays.values()} == {"float32"}


def test_two_towers():
    found, fresh = from_parts(DECODER, VISION, VISION)
    assert found.config.adapter.kind == "sum" and len(found.config.encoders) == 2 and fresh == ("adapter", "special")
    assert {path.split("/")[1] for path in found.arrays if path.startswith("encoders/")} == {"0", "1"}
    with pytest.raises(ConfigError, match="takes 1 of the two encoders"):
        from_parts(DECODER, VISION, VISION, name="omnifusion-1.1")
    with pytest.raises(ConfigError, match="takes 2 of the two encoders"):
        from_parts(DECODER, VISION, name="omnifusion-1.1-mix")
    with pytest.raises(ConfigError, match="no model preset 'gpt'"):
        from_parts(DECODER, VISION, name="gpt")


def test_the_command_line(tmp_path):
    said = run_command("convert", f"--vision={VISION}", f"--decoder={DECODER}", "--preset=llava-1.5-7b", f"--output={tmp_path / 'native'}")
    adapter = 2 * (128 * 128 + 128)
    assert f"adapter    {adapter:>14,} parameters, freshly initialised (seed 0), to be trained" in said
    assert load_checkpoint(tmp_path / "native").missing == ()
    assert of.load(tmp_path / "native").generate([of.Request(QUESTION)], of.GenerationConfig(max_new_tokens=3))
    refused = run_command("convert", f"--decoder={DECODER}", f"--output={tmp_path / 'none'}", fails=True)
    assert "--decoder needs --vision" in refused
