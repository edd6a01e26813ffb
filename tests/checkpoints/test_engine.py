"""The conversion engine, the tables for the full-size model, config.json."""

import json
import math

import ml_dtypes
import models
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPVisionConfig, CLIPVisionModel, MistralConfig, MistralForCausalLM

from omnifusion_jax.checkpoints import clip, huggingface, mistral, original
from omnifusion_jax.checkpoints.engine import MATRIX, SAME, from_foreign, shapes_of, slots, split, split_in, split_out, to_foreign
from omnifusion_jax.config import DecoderConfig, EncoderConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import preset

C = tiny.config()
SHAPES = shapes_of(C, "decoder")
TABLE = mistral.table(C.decoder)
BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def foreign():
    return to_foreign(tiny.arrays(C, "decoder"), TABLE)


def refusal(tensors, **settings):
    with pytest.raises(CheckpointError) as caught:
        from_foreign(tensors, TABLE, SHAPES, "model.bin", **settings)
    return str(caught.value)


def test_there_and_back_is_the_same_to_the_bit():
    arrays = tiny.arrays(C, "decoder", dtype=BF16)
    back = from_foreign(to_foreign(arrays, TABLE), TABLE, SHAPES, "here")
    assert back.keys() == arrays.keys()
    for path, a in arrays.items():
        assert back[path].dtype == BF16
        np.testing.assert_array_equal(np.asarray(back[path]).view(np.uint16), a.view(np.uint16))


@given(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_transforms_are_inverse(other, dims):
    n = int(np.prod(dims))
    for transform, shape in ((SAME, (n,)), (MATRIX, (n, other)), (split(*dims), (n,)), (split_out(*dims), (n, other)), (split_in(*dims), (other, n))):
        a = np.arange(np.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(transform.backward(transform.forward(a)), a)


def test_every_misfit_is_in_one_error(foreign):
    foreign["extra.weight"] = foreign["model.norm.weight"]
    foreign["model.layers.7.mlp.up_proj.weight"] = foreign["model.layers.0.mlp.up_proj.weight"]
    foreign["lm_head.weight"] = foreign["lm_head.weight"][:-1]
    foreign["model.layers.0.input_layernorm.weight"] = foreign["model.layers.0.input_layernorm.weight"].astype(np.int8)
    foreign["model.layers.2.input_layernorm.weight"] = foreign["model.layers.2.input_layernorm.weight"].astype(BF16)
    del foreign["model.embed_tokens.weight"]
    for name in [name for name in foreign if ".layers.1." in name]:
        del foreign[name]
    said = refusal(foreign)
    for line in (
        "model.bin: 15 tensors do not fit",
        "extra.weight -> nowhere: the model has no such tensor",
        "model.layers.7.mlp.up_proj.weight -> nowhere: decoder/layers/up has 3 layers",
        "lm_head.weight -> decoder/head: has shape [319, 48], [320, 48] is needed",
        "model.layers.0.input_layernorm.weight -> decoder/layers/norm1/scale[0]: is int8, not floating-point",
        "model.layers.2.input_layernorm.weight -> decoder/layers/norm1/scale[2]: is bfloat16, other layers are int8",
        "model.embed_tokens.weight -> decoder/embed: missing",
        "model.layers.1.self_attn.q_proj.weight -> decoder/layers/attention/query[1]: missing",
    ):
        assert line in said


def test_two_names_for_one_place_are_refused():
    c = C.encoder
    foreign = to_foreign(tiny.arrays(C, "encoders"), clip.CLIP.table(c))
    bare = {name.removeprefix(clip.PREFIX): a for name, a in foreign.items()}
    for tensors in (foreign, bare):
        from_foreign(tensors, clip.CLIP.table(c), shapes_of(C, "encoders"), "here", prefix=clip.PREFIX)
    foreign["pre_layrnorm.weight"] = bare["pre_layrnorm.weight"]
    with pytest.raises(CheckpointError, match="more than one tensor for one place") as caught:
        from_foreign(foreign, clip.CLIP.table(c), shapes_of(C, "encoders"), "here", prefix=clip.PREFIX)
    assert "vision_model.pre_layrnorm.weight and pre_layrnorm.weight -> encoders/0/pre_norm/scale" in str(caught.value)


def test_export_refuses_what_the_format_cannot_hold(foreign):
    arrays = tiny.arrays(C, "decoder")
    arrays["decoder/bias"] = arrays.pop("decoder/head")
    with pytest.raises(CheckpointError, match=r"decoder/head: missing\n  decoder/bias: the format has no place"):
        to_foreign(arrays, TABLE)


def test_the_full_size_model_maps_onto_the_published_tensors():
    """Names and shapes of Mistral-7B-v0.1, CLIP-ViT-L/14-336 and the adapter; no memory is taken."""
    c = preset("omnifusion-1.1")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    with torch.device("meta"):
        theirs = {
            "decoder": MistralForCausalLM(MistralConfig(rms_norm_eps=1e-5, max_position_embeddings=32768)),
            "encoders": CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=336, patch_size=14)),
            "adapter": models.VisualToGPTMapping(1024, 4096, 576, 4),
        }
    tables = {"decoder": mistral.table(c.decoder), "encoders": clip.CLIP.table(c.encoder), "adapter": original.adapter_table(c)}
    for part, module in theirs.items():
        shapes = shapes_of(c, part)
        mapped = {name.removeprefix(clip.PREFIX): slot.shape for name, slot in slots(tables[part], shapes).items()}
        assert mapped == {name: tuple(t.shape) for name, t in module.state_dict().items()}
        assert {piece.path for slot in slots(tables[part], shapes).values() for piece in slot.pieces} == set(shapes)
    sizes = {part: sum(math.prod(shape) for shape in shapes_of(c, part).values()) for part in ("adapter", "decoder")}
    assert sizes == {"adapter": 12_598_272, "decoder": 7_241_732_096}
    assert shapes_of(c, "special") == {f"special/{name}": (4096,) for name in ("user", "bot", "soi", "eoi")}


@pytest.mark.parametrize("c", [DecoderConfig(), C.decoder, DecoderConfig(window=None)])
def test_mistral_config_both_ways(c):
    assert mistral.decoder_config(mistral.decoder_json(c, "bfloat16")) == c
    assert mistral.decoder_config(json.loads(MistralConfig(**mistral.decoder_json(c, "bfloat16")).to_json_string(use_diff=False))) == c


def test_mistral_config_of_the_published_model():
    published = {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "num_key_value_heads": 8, "hidden_act": "silu", "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "transformers_version": "4.37.1",
    }  # fmt: skip
    assert mistral.decoder_config(published) == DecoderConfig()


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"}, {"hidden_act": "gelu"}, {"attention_bias": True}, {"quantization_config": {"bits": 8}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    ],
)  # fmt: skip
def test_mistral_settings_we_do_not_have_are_refused_by_name(change):
    name = next(iter(change))
    with pytest.raises(CheckpointError, match=r"dir/config.json: (rope scaling|" + name + ") is "):
        mistral.decoder_config({**mistral.decoder_json(C.decoder, "float32"), **change}, "dir/config.json")


def test_tied_embeddings_become_a_head(foreign):
    tied = {name: a for name, a in foreign.items() if name != "lm_head.weight"}
    arrays = from_foreign(mistral.untied(tied, {"tie_word_embeddings": True}), TABLE, SHAPES, "here")
    np.testing.assert_array_equal(arrays["decoder/head"], np.asarray(arrays["decoder/embed"]).T)
    assert "lm_head.weight -> decoder/head: missing" in refusal(mistral.untied(tied, {"tie_word_embeddings": False}))


@pytest.mark.parametrize("c", [EncoderConfig(), C.encoder, EncoderConfig(activation="gelu")])
def test_clip_config_both_ways(c):
    assert clip.CLIP.encoder_config(clip.CLIP.encoder_json(c, "float32"), huggingface.preprocessor_json(c)) == c
    saved = json.loads(CLIPVisionConfig(**clip.CLIP.encoder_json(c, "float32")).to_json_string(use_diff=False))
    assert clip.CLIP.encoder_config(saved) == c
    assert clip.CLIP.encoder_config({"model_type": "clip", "vision_config": saved, "vision_config_dict": None}) == c


def test_clip_settings_we_do_not_have_are_refused_by_name():
    c = C.encoder
    with pytest.raises(CheckpointError, match="hidden_act is 'relu', supported is 'quick_gelu' or 'gelu'"):
        clip.CLIP.encoder_config({**clip.CLIP.encoder_json(c, "float32"), "hidden_act": "relu"})
    with pytest.raises(CheckpointError, match="crop_size is 336, supported is 24"):
        clip.CLIP.encoder_config(clip.CLIP.encoder_json(c, "float32"), {"crop_size": 336})
    with pytest.raises(CheckpointError, match="model_type is 'siglip'"):
        clip.CLIP.encoder_config({"model_type": "siglip"})
