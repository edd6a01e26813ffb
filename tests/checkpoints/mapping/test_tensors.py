"""The conversion engine, the tables for the full-size model, config.json."""

import dataclasses
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
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import clip, hugging_face
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import destinations, from_foreign, to_foreign
from omnifusion_jax.checkpoints.mapping.transforms import MATRIX, SAME, Fused, split, split_in, split_out
from omnifusion_jax.checkpoints.omnifusion import original
from omnifusion_jax.config import DecoderConfig, EncoderConfig, RopeScaling
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import preset

C = tiny.config()
SHAPES = shapes_of(C, "decoder")
TABLE = language_models.table(C.decoder)
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
    for transform, shape in (
        (SAME, (n,)),
        (MATRIX, (n, other)),
        (split(*dims), (n,)),
        (split_out(*dims), (n, other)),
        (split_in(*dims), (other, n)),
    ):
        a = np.arange(np.prod(shape)).reshape(shape)
        np.testing.assert_array_equal(transform.backward(transform.forward(a)), a)


def test_every_misfit_is_in_one_error(foreign):
    foreign["extra.weight"] = foreign["model.norm.weight"]
    foreign["model.layers.7.mlp.up_proj.weight"] = foreign["model.layers.0.mlp.up_proj.weight"]
    foreign["lm_head.weight"] = foreign["lm_head.weight"][:-1]
    foreign["model.layers.0.input_layernorm.weight"] = foreign[
        "model.layers.0.input_layernorm.weight"
    ].astype(np.int8)
    foreign["model.layers.2.input_layernorm.weight"] = foreign[
        "model.layers.2.input_layernorm.weight"
    ].astype(BF16)
    del foreign["model.embed_tokens.weight"]
    for name in [name for name in foreign if ".layers.1." in name]:
        del foreign[name]
    said = refusal(foreign)
    for line in (
        "model.bin: 15 tensors do not fit",
        "extra.weight -> nowhere: the model has no such tensor",
        "model.layers.7.mlp.up_proj.weight -> nowhere: decoder/layers/feed_forward/up/kernel has 3 layers",
        "lm_head.weight -> decoder/head: has shape [319, 48], [320, 48] is needed",
        "model.layers.0.input_layernorm.weight -> decoder/layers/norm1/scale[0]: is int8, not floating-point",
        (
            "model.layers.2.input_layernorm.weight -> decoder/layers/norm1/scale[2]: "
            "is bfloat16, other layers are int8"
        ),
        "model.embed_tokens.weight -> decoder/embed: missing",
        "model.layers.1.self_attn.q_proj.weight -> decoder/layers/attention/query/kernel[1]: missing",
    ):
        assert line in said


def test_two_names_for_one_place_are_refused():
    c = C.image.encoders[0]
    foreign = to_foreign(tiny.arrays(C, "image/encoders/0"), clip.CLIP.table(c))
    bare = {name.removeprefix(clip.PREFIX): a for name, a in foreign.items()}
    for tensors in (foreign, bare):
        from_foreign(
            tensors, clip.CLIP.table(c), shapes_of(C, "image/encoders/0"), "here", prefix=clip.PREFIX
        )
    foreign["pre_layrnorm.weight"] = bare["pre_layrnorm.weight"]
    with pytest.raises(CheckpointError, match="more than one tensor for one place") as caught:
        from_foreign(
            foreign, clip.CLIP.table(c), shapes_of(C, "image/encoders/0"), "here", prefix=clip.PREFIX
        )
    assert (
        "vision_model.pre_layrnorm.weight and pre_layrnorm.weight -> image/encoders/0/pre_norm/scale"
        in str(caught.value)
    )


def test_export_refuses_what_the_format_cannot_hold(foreign):
    arrays = tiny.arrays(C, "decoder")
    arrays["decoder/bias"] = arrays.pop("decoder/head")
    with pytest.raises(
        CheckpointError, match=r"decoder/head: missing\n  decoder/bias: the format has no place"
    ):
        to_foreign(arrays, TABLE)


FUSED_SHAPES = {
    "query": (2, 4, 2, 3),
    "key": (2, 4, 3),
    "value": (2, 4, 3),
    "bias": (5,),
    "scale": (2,),
    "norm": (2, 4),
}
FUSED = {
    "blocks.{}.qkv.weight": Fused(("query", split_out(2, 3)), ("key", MATRIX), ("value", MATRIX)),
    "biases": Fused(("bias", SAME), ("scale", SAME)),
    "blocks.{}.norm": ("norm", SAME),
}


def fused():
    return {
        path: np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        for path, shape in FUSED_SHAPES.items()
    }


def test_one_foreign_tensor_of_several_of_ours():
    arrays = fused()
    foreign = to_foreign(arrays, FUSED)
    assert {name: a.shape for name, a in foreign.items()} == {
        "blocks.0.qkv.weight": (12, 4), "blocks.1.qkv.weight": (12, 4), "biases": (7,),
        "blocks.0.norm": (4,), "blocks.1.norm": (4,),
    }  # fmt: skip
    parts = arrays["query"][1].reshape(4, 6).T, arrays["key"][1].T, arrays["value"][1].T
    np.testing.assert_array_equal(foreign["blocks.1.qkv.weight"], np.concatenate(parts))
    back = from_foreign(foreign, FUSED, FUSED_SHAPES, "here")
    for path, a in arrays.items():
        np.testing.assert_array_equal(back[path], a)
        np.testing.assert_array_equal(back[path][1:], a[1:])


def test_misfits_of_fused_tensors():
    foreign = dict(to_foreign(fused(), FUSED))
    foreign["blocks.0.qkv.weight"] = foreign["blocks.0.qkv.weight"][:-1]
    foreign["blocks.2.qkv.weight"] = foreign.pop("blocks.1.qkv.weight")
    foreign["biases"] = foreign["biases"].astype(np.int8)
    with pytest.raises(CheckpointError) as caught:
        from_foreign(foreign, FUSED, FUSED_SHAPES | {"lonely": (3,)}, "here")
    for line in (
        "here: 5 tensors",
        "blocks.0.qkv.weight -> query[0] and key[0] and value[0]: has shape [11, 4], [12, 4] is needed",
        "blocks.1.qkv.weight -> query[1] and key[1] and value[1]: missing",
        "blocks.2.qkv.weight -> nowhere: query has 2 layers",
        "biases -> bias and scale: is int8, not floating-point",
        "(no name) -> lonely: the format has no place for it",
    ):
        assert line in str(caught.value)
    with pytest.raises(CheckpointError, match="scale: missing"):
        to_foreign({path: a for path, a in fused().items() if path != "scale"}, FUSED)


def test_the_full_size_model_maps_onto_the_published_tensors():
    """Names and shapes of Mistral-7B-v0.1, CLIP-ViT-L/14-336 and the adapter; no memory is taken."""
    c = preset("omnifusion-1.1")
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    with torch.device("meta"):
        theirs = {
            "decoder": MistralForCausalLM(MistralConfig(rms_norm_eps=1e-5, max_position_embeddings=32768)),
            "image/encoders/0": CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=336, patch_size=14)),
            "image/adapter": models.VisualToGPTMapping(1024, 4096, 576, 4),
        }
    tables = {
        "decoder": language_models.table(c.decoder),
        "image/encoders/0": clip.CLIP.table(c.image.encoders[0]),
    }
    tables["image/adapter"] = original.adapter_table(c)
    for part, module in theirs.items():
        shapes = shapes_of(c, part)
        mapped = {
            name.removeprefix(clip.PREFIX): place.shape
            for name, place in destinations(tables[part], shapes).items()
        }
        assert mapped == {name: tuple(t.shape) for name, t in module.state_dict().items()}
        assert {
            piece.path for place in destinations(tables[part], shapes).values() for piece in place.pieces
        } == set(shapes)
    sizes = {
        part: sum(math.prod(shape) for shape in shapes_of(c, part).values())
        for part in ("image/adapter", "decoder")
    }
    assert sizes == {"image/adapter": 12_598_272, "decoder": 7_241_732_096}
    assert shapes_of(c, "special") == {f"special/{name}": (4096,) for name in ("user", "bot", "soi", "eoi")}


LLAMA = DecoderConfig(
    family="llama", kv_heads=32, mlp=11008, max_length=2048, eps=1e-6, window=None
)  # what a bare LlamaConfig says


QWEN2 = DecoderConfig(
    family="qwen2",
    vocab=151936,
    kv_heads=32,
    mlp=22016,
    max_length=32768,
    eps=1e-6,
    window=None,
    qkv_bias=True,
)  # likewise
CLASSES = {"mistral": MistralConfig, "llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@pytest.mark.parametrize(
    "c",
    [
        DecoderConfig(),
        C.decoder,
        DecoderConfig(window=None),
        LLAMA,
        QWEN2,
        dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=RopeScaling(32.0, 1.5, 3.0, 4096), tied=True),
        dataclasses.replace(
            QWEN2, family="qwen3", qkv_bias=False, qk_norm=True, tied=True, rope_theta=1e6, head_dim=64
        ),
    ],
)
def test_decoder_config_both_ways(c):
    theirs = CLASSES[c.family](**language_models.decoder_json(c, "bfloat16"))
    assert language_models.decoder_config(language_models.decoder_json(c, "bfloat16")) == c
    assert language_models.decoder_config(json.loads(theirs.to_json_string(use_diff=False))) == c


def test_fields_that_a_file_leaves_out_are_those_of_the_class():
    assert {*CLASSES, "minicpm"} == set(language_models.FAMILIES)  # transformers has no class for MiniCPM
    for kind, cls in CLASSES.items():
        assert language_models.decoder_config({"model_type": kind}) == language_models.decoder_config(
            json.loads(cls().to_json_string(use_diff=False))
        )
    assert language_models.decoder_config({"model_type": "llama"}) == LLAMA
    assert language_models.decoder_config({"model_type": "qwen2"}) == QWEN2


def test_mistral_config_of_the_published_model():
    published = {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "vocab_size": 32000, "num_key_value_heads": 8, "hidden_act": "silu",
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "transformers_version": "4.37.1",
    }  # fmt: skip
    assert language_models.decoder_config(published) == DecoderConfig()


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "gemma"}, {"hidden_act": "gelu"}, {"attention_bias": True},
        {"use_sliding_window": True, "model_type": "qwen2"},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
    ],
)  # fmt: skip
def test_decoder_settings_we_do_not_have_are_refused_by_name(change):
    name = next(iter(change))
    with pytest.raises(CheckpointError, match=r"dir/config.json: (rope scaling|" + name + ") is "):
        language_models.decoder_config(
            {**language_models.decoder_json(C.decoder, "float32"), **change}, "dir/config.json"
        )


def test_only_whole_names_are_ignored(foreign):
    foreign["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    assert (
        from_foreign(foreign, TABLE, SHAPES, "here", ignore=language_models.IGNORED).keys() == SHAPES.keys()
    )
    foreign["model.layers.0.self_attn.rotary_emb.inv_freq_scale"] = np.ones(8, np.float32)
    assert "inv_freq_scale -> nowhere" in refusal(foreign, ignore=language_models.IGNORED)
    foreign["embeddings.position_ids"] = np.ones(8, np.float32)
    assert "embeddings.position_ids -> nowhere" in refusal(
        foreign, ignore=("position_ids", *language_models.IGNORED)
    )


def test_where_rope_theta_stands():
    """At the top in files of transformers 4, in rope_parameters in those of 5; the latter decides."""
    five = {"rope_type": "default", "rope_theta": 5e5}
    for settings, theta in (
        ({}, 10000.0),
        ({"rope_theta": 1000000}, 1e6),
        ({"rope_theta": 2e4, "rope_scaling": None}, 2e4),
        ({"rope_parameters": five}, 5e5),
        ({"rope_parameters": five, "rope_theta": 1e4}, 5e5),
    ):
        found = language_models.decoder_config({"model_type": "mistral", **settings}).rope_theta
        assert found == theta and type(found) is float


def test_a_stored_copy_of_a_tied_head_is_left_out(foreign):
    """Also of bfloat16, which NumPy compares only by way of ml_dtypes; what is no copy is refused."""
    tied = dataclasses.replace(C.decoder, tied=True)
    head, embed = language_models.HEAD, language_models.EMBED
    bare = {name: a for name, a in foreign.items() if name != head}
    for kind in (np.float32, BF16):
        copied = {name: a.astype(kind) for name, a in {**foreign, head: foreign[embed]}.items()}
        assert language_models.without_copy(copied, tied, "here").keys() == bare.keys()
        assert (
            language_models.without_copy(copied, C.decoder, "here") is copied
        )  # without a tie a head is a head
    shapes = {path: shape for path, shape in SHAPES.items() if path != "decoder/head"}
    arrays = from_foreign(
        language_models.without_copy({**foreign, head: foreign[embed]}, tied, "here"),
        language_models.table(tied),
        shapes,
        "here",
    )
    assert arrays.keys() == shapes.keys()
    assert language_models.without_copy(bare, tied, "here") is bare
    assert "lm_head.weight -> decoder/head: missing" in refusal(
        language_models.without_copy(bare, C.decoder, "here")
    )
    other = np.array(foreign[embed])
    other[-1, -1] += 1e-6
    with pytest.raises(
        CheckpointError, match=r"here: tie_word_embeddings is true, but lm_head.weight is not model.embed"
    ):
        language_models.without_copy({**foreign, head: other}, tied, "here")


@pytest.mark.parametrize(
    "c, name",
    [
        (DecoderConfig(logit_scale=2.0), "logit_scale"),
        (DecoderConfig(qkv_bias=True), "qkv_bias"),
        (DecoderConfig(family="llama", window=9), "window"),
        (DecoderConfig(family="qwen3", window=None), "qk_norm"),
    ],
)
def test_what_no_model_of_the_family_computes_is_not_written(c, name):
    with pytest.raises(CheckpointError, match=f"family {c.family} has no {name}="):
        language_models.decoder_json(c, "float32")


@pytest.mark.parametrize("c", [EncoderConfig(), C.image.encoders[0], EncoderConfig(activation="gelu")])
def test_clip_config_both_ways(c):
    assert (
        clip.CLIP.encoder_config(clip.CLIP.encoder_json(c, "float32"), hugging_face.preprocessor_json(c)) == c
    )
    saved = json.loads(
        CLIPVisionConfig(**clip.CLIP.encoder_json(c, "float32")).to_json_string(use_diff=False)
    )
    assert clip.CLIP.encoder_config(saved) == c
    assert (
        clip.CLIP.encoder_config({"model_type": "clip", "vision_config": saved, "vision_config_dict": None})
        == c
    )


def test_clip_settings_we_do_not_have_are_refused_by_name():
    c = C.image.encoders[0]
    with pytest.raises(CheckpointError, match="hidden_act is 'relu', supported is 'quick_gelu' or 'gelu'"):
        clip.CLIP.encoder_config({**clip.CLIP.encoder_json(c, "float32"), "hidden_act": "relu"})
    with pytest.raises(CheckpointError, match="crop_size is 336, supported is 24"):
        clip.CLIP.encoder_config(clip.CLIP.encoder_json(c, "float32"), {"crop_size": 336})
    with pytest.raises(CheckpointError, match="model_type is 'siglip'"):
        clip.CLIP.encoder_config({"model_type": "siglip"})
