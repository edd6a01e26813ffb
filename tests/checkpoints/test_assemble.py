"""Models put together from a vision tower and a language model."""

import json
import shutil

import numpy as np
import pytest
import tiny
import tokenizers
from conftest import run_command

import omnifusion_jax as of
from omnifusion_jax.checkpoints.assemble import from_parts, joined
from omnifusion_jax.checkpoints.encoders.vision_towers import write_encoder
from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder, load_encoder
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.storage.bundled import ASSETS
from omnifusion_jax.config import ImageConfig, adapter
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.models.presets import preset

VISION, DECODER = "omnifusion-tiny-encoder", "omnifusion-tiny-decoder"
QUESTION = [{"role": "user", "content": "What is it?"}]


def test_stored_parts_stay_and_the_rest_is_fresh():
    found, fresh = from_parts(DECODER, VISION)
    assert fresh == ("image/adapter", "special") and found.missing == () and found.config.preset == "parts"
    assert found.config.image.adapter.kind == "transformer" and found.config.layout == "omnifusion"
    (_, tower), (_, decoder, tokenizer) = load_encoder(VISION), load_decoder(DECODER)
    for path, a in {**tower, **decoder}.items():
        np.testing.assert_array_equal(found.arrays[path], a)
    assert found.tokenizer == tokenizer and {str(a.dtype) for a in found.arrays.values()} == {"bfloat16"}


def test_a_preset_says_how_they_are_joined():
    found, fresh = from_parts(DECODER, VISION, name="llava-1.5-7b", dtype="float32")
    wanted = preset("llava-1.5-7b")
    assert fresh == ("image/adapter",) and found.config.special == ()
    wanted.image.encoders = (load_encoder(VISION)[0],)
    wanted.image.adapter = adapter("mlp", mlp=128)  # as wide as the decoder, as the preset's
    assert (found.config.template, found.config.image) == (wanted.template, wanted.image)
    assert found.config.decoder.vocab == 852
    assert {str(a.dtype) for a in found.arrays.values()} == {"float32"}


def test_two_towers():
    found, fresh = from_parts(DECODER, VISION, VISION)
    assert (
        found.config.image.adapter.kind == "sum"
        and len(found.config.image.encoders) == 2
        and fresh == ("image/adapter", "special")
    )
    assert {path.split("/")[2] for path in found.arrays if path.startswith("image/encoders/")} == {"0", "1"}
    with pytest.raises(ConfigError, match="takes 1 of the encoders, there are 2"):
        from_parts(DECODER, VISION, VISION, name="omnifusion-1.1")
    with pytest.raises(ConfigError, match="takes 2 of the encoders, there is 1"):
        from_parts(DECODER, VISION, name="omnifusion-1.1-mix")
    with pytest.raises(ConfigError, match="no model preset 'gpt'"):
        from_parts(DECODER, VISION, name="gpt")


@pytest.mark.parametrize("first", ["squash", "crop"])
def test_pictures_are_fitted_as_the_first_of_two_towers_is_used_to(tmp_path, first):
    c, arrays = load_encoder(VISION)
    write_encoder(made(tmp_path / "squash"), c, arrays, fit="squash")
    write_encoder(made(tmp_path / "crop"), c, arrays, fit="crop")
    second = {"squash": "crop", "crop": "squash"}[first]
    found, _ = from_parts(DECODER, str(tmp_path / first), str(tmp_path / second))
    assert found.config.image.fit == first


def made(directory):
    directory.mkdir()
    return directory


def test_the_first_tower_of_a_model_with_two_may_become_the_second(tmp_path):
    """It alone is read, whatever stands beside it."""
    c = tiny.config()
    c.image = ImageConfig(c.image.encoders * 2, adapter("sum", width=16))
    arrays = tiny.arrays(c, "image/encoders/0", "image/encoders/1")
    save_native(tmp_path / "both", c, arrays)
    _, found = load_encoder(tmp_path / "both", "image/encoders/1")
    first = {
        path.replace("encoders/0", "encoders/1"): a
        for path, a in arrays.items()
        if path.startswith("image/encoders/0/")
    }
    assert found.keys() == first.keys()
    for path, a in first.items():
        np.testing.assert_array_equal(found[path], a)


def test_which_features_are_used_is_the_presets_affair():
    """Of each tower for itself; a tower more than the preset has is used as its first."""
    mix, tower, decoder = preset("omnifusion-1.1-mix"), load_encoder(VISION)[0], load_decoder(DECODER)[0]
    mix.image.encoders[0].feature_layer, mix.image.encoders[1].feature_layer, tower.feature_layer = -3, -1, -4
    assert [encoder.feature_layer for encoder in joined(mix, [tower, tower], decoder).image.encoders] == [
        -3,
        -1,
    ]
    mix.image.encoders = mix.image.encoders[:1]
    assert [encoder.feature_layer for encoder in joined(mix, [tower, tower], decoder).image.encoders] == [
        -3,
        -3,
    ]


def greedy_by_transformers(text, count):
    """What the bundled language model goes on with, by the library it was written for."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / DECODER, dtype=torch.float32)
    ids = torch.tensor(
        [
            tokenizers.Tokenizer.from_file(str(ASSETS / DECODER / "tokenizer.json"))
            .encode(text, add_special_tokens=False)
            .ids
        ]
    )
    settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, ids.shape[1] :].tolist()


def test_the_command_line(tmp_path):
    said = run_command(
        "convert",
        f"--vision={VISION}",
        f"--decoder={DECODER}",
        "--preset=llava-1.5-7b",
        f"--output={tmp_path / 'native'}",
        "--dtype=float32",
    )
    size = 2 * (128 * 128 + 128)
    assert f"image/adapter    {size:>14,} parameters, freshly initialised (seed 0), to be trained" in said
    native = load_checkpoint(tmp_path / "native")
    assert native.missing == () and {str(a.dtype) for a in native.arrays.values()} == {
        "float32"
    }  # not what was stored
    [answer] = of.load(tmp_path / "native").generate(
        [of.Request(QUESTION)], of.GenerationConfig(max_new_tokens=3)
    )
    assert list(answer.tokens) == greedy_by_transformers("USER: What is it? ASSISTANT:", 3)
    refused = run_command("convert", f"--decoder={DECODER}", f"--output={tmp_path / 'none'}", fails=True)
    assert "--decoder needs --vision" in refused


def test_a_part_alone_is_no_model_and_says_how_it_becomes_one():
    for source in (VISION, ASSETS / VISION):
        message = (
            rf"{source}: a vision tower alone.*"
            rf"\.convert --vision={source} --decoder=LANGUAGE_MODEL --output"
        )
        with pytest.raises(CheckpointError, match=message):
            of.load(source)
    message = (
        r"a language model alone.*"
        r"\.convert --decoder=omnifusion-tiny-decoder --vision=VISION_TOWER --output"
    )
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(DECODER)


def change_tokenizer(directory, change):
    values = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    change(values)
    (directory / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")


def one_too_many(values):
    last = {
        "id": 852,
        "content": "<more>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    values["added_tokens"].append(last)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer for the language model"),
        (
            lambda d: (d / "tokenizer.json").write_text("{"),
            r"its tokenizer cannot be used: .*tokenizer\.json: not a tokenizer",
        ),
        (lambda d: (d / "tokenizer_config.json").write_text("{"), "its tokenizer cannot be used"),
        (
            lambda d: (d / "tokenizer_config.json").write_text('{"eos_token": "<end>"}'),
            "tokenizer.json does not know the eos_token '<end>'",
        ),
        (lambda d: change_tokenizer(d, one_too_many), r"853 tokens, model\.decoder\.vocab is 852"),
    ],
)
def test_a_tokenizer_that_cannot_be_used_is_refused_before_anything_is_made(
    tmp_path, monkeypatch, spoil, said
):
    shutil.copytree(ASSETS / DECODER, tmp_path / "decoder")
    spoil(tmp_path / "decoder")
    monkeypatch.setattr(
        "omnifusion_jax.checkpoints.assemble.fresh", lambda *_: pytest.fail("parameters were made")
    )
    with pytest.raises(CheckpointError, match=said):
        from_parts(tmp_path / "decoder", VISION)
    if (tmp_path / "decoder/tokenizer.json").is_file():
        shutil.copytree(ASSETS / "omnifusion-tiny", tmp_path / "whole")
        shutil.rmtree(tmp_path / "whole/tokenizer")
        shutil.copytree(tmp_path / "decoder", tmp_path / "whole/tokenizer")
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(tmp_path / "whole", vision=VISION)
