"""Vision towers: published settings and sizes, what Hugging Face's classes load of ours, and refusals."""

import dataclasses
import inspect
import json
import math
import re

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
import transformers
from parity.files import random_file
from parity.vision_models import Eva02, Hub, InternViT, OpenClip
from PIL import Image

from omnifusion_jax.checkpoints.encoders.base import EncoderFamily
from omnifusion_jax.checkpoints.encoders.hugging_face import preprocessor_json
from omnifusion_jax.checkpoints.encoders.vision_towers import (
    VISION_FAMILIES,
    WRITTEN,
    preferred_fit,
    write_encoder,
    written_as,
)
from omnifusion_jax.checkpoints.load import load_checkpoint, load_encoder
from omnifusion_jax.checkpoints.mapping.shapes import encoder_shapes
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.checkpoints.storage.weights import open_tensors, read_safetensors, write_safetensors
from omnifusion_jax.config import HALF, IMAGENET_MEAN, IMAGENET_STD, ImageConfig, ModelConfig, TrainConfig
from omnifusion_jax.data.images import fit
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.models.encoder_presets import PUBLISHED as NAMED
from omnifusion_jax.models.encoder_presets import encoder

BF16 = np.dtype(ml_dtypes.bfloat16)

# What published config.json and preprocessor_config.json say, where it is no default of the library
CROP_224 = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
}
SIGLIP = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 3,
}
BIT = {
    **CROP_224,
    "size": {"shortest_edge": 256},
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
    "rescale_factor": 0.00392156862745098,
}
INTERN = {
    "crop_size": 448,
    "do_center_crop": True,
    "size": 448,
    "resample": 3,
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
SHAPE400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
BIGG = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16}
DINOV2 = {
    "image_size": 518,
    "patch_size": 14,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
GIANT = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
REGISTERS = {"model_type": "dinov2_with_registers", "num_register_tokens": 4}
PUBLISHED = {
    "clip-vit-b-32": ({"model_type": "clip", "vision_config": {}}, CROP_224),
    "clip-vit-b-16": ({"model_type": "clip", "vision_config": {"patch_size": 16}}, CROP_224),
    "clip-vit-l-14": (
        {"model_type": "clip", "vision_config": {**LARGE, "intermediate_size": 4096, "patch_size": 14}},
        CROP_224,
    ),
    "clip-vit-bigg-14": (
        {"model_type": "clip", "vision_config": {**BIGG, "patch_size": 14, "hidden_act": "gelu"}},
        CROP_224,
    ),
    "siglip-base-16-512": (
        {"model_type": "siglip", "vision_config": {"image_size": 512}},
        {**SIGLIP, "size": {"height": 512, "width": 512}},
    ),
    "siglip-so400m-14-384": (
        {"model_type": "siglip", "vision_config": {**SHAPE400M, "image_size": 384, "patch_size": 14}},
        {**SIGLIP, "size": {"height": 384, "width": 384}},
    ),
    "dinov2-l": ({"model_type": "dinov2", **DINOV2, **LARGE}, BIT),
    "dinov2-g": ({"model_type": "dinov2", **DINOV2, **GIANT}, BIT),
    "dinov2-l-reg": ({**REGISTERS, **DINOV2, **LARGE}, BIT),
    "dinov2-g-reg": ({**REGISTERS, **DINOV2, **GIANT}, BIT),
    "internvit-6b-448": (
        {
            "model_type": "intern_vit_6b", "hidden_size": 3200, "image_size": 448, "intermediate_size": 12800,
            "num_attention_heads": 25, "num_hidden_layers": 45, "patch_size": 14, "qk_normalization": True,
            "qkv_bias": False, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        },
        INTERN,
    ),
    "internvit-300m-448": (
        {
            "model_type": "intern_vit_6b", **LARGE, "image_size": 448, "intermediate_size": 4096,
            "patch_size": 14, "qk_normalization": False, "qkv_bias": True, "norm_type": "layer_norm",
            "hidden_act": "gelu", "layer_norm_eps": 1e-6, "use_moe": False,
        },
        INTERN,
    ),
}  # fmt: skip


def family_class(c):
    """Hugging Face's model of an encoder, without memory."""
    family = VISION_FAMILIES[written_as(c)]
    settings = {
        name: value
        for name, value in family.encoder_json(c, "float32").items()
        if name not in ("architectures", "model_type", "torch_dtype")
    }
    cls = getattr(transformers, family.architecture)
    with torch.device("meta"):
        return cls(cls.config_class(**settings))


def write(directory, config, preprocessor=None):
    (directory / "config.json").write_text(json.dumps(config))
    if preprocessor:
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def random_arrays(c, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"image/encoders/0/{path}": rng.normal(size=shape).astype(BF16)
        for path, shape in encoder_shapes(c).items()
    }


def same(arrays, others):
    assert arrays.keys() == others.keys()
    for path, a in arrays.items():
        np.testing.assert_array_equal(np.asarray(a).view(np.uint16), np.asarray(others[path]).view(np.uint16))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_the_presets(tmp_path, name):
    write(tmp_path, *PUBLISHED[name])
    family = next(family for family in VISION_FAMILIES.values() if family.knows(tmp_path))
    config, how = family.settings(tmp_path)
    assert config == NAMED[name]
    assert how == preferred_fit(tmp_path) == ("squash" if "siglip" in name else "crop")


# Parameters of published models without a head over the patches; DINOv2's mask token is not ours. InternViT's
# by hand: a layer is (4 + 2 * mlp / width) * width**2 and biases, norms, scales; so are EVA02-E's, whose keys
# have no bias
COUNTS = {
    "clip-vit-b-32": 87_456_000, "clip-vit-b-16": 85_799_424, "clip-vit-l-14": 303_179_776,
    "clip-vit-l-14-336": 303_507_456, "clip-vit-bigg-14": 1_842_777_344,
    "siglip-base-16-512": 86_433_024, "siglip-so400m-14-384": 412_987_248,
    "dinov2-s": 22_056_576 - 384, "dinov2-b": 86_580_480 - 768,
    "dinov2-l": 304_368_640 - 1024, "dinov2-g": 1_136_480_768 - 1536,
    "dinov2-s-reg": 22_057_728, "dinov2-b-reg": 86_582_784,
    "dinov2-l-reg": 304_371_712, "dinov2-g-reg": 1_136_485_376,
    "internvit-6b-448": 45 * 122_918_400 + 1025 * 3200 + 3200 + (3 * 14**2 + 1) * 3200,
    "eva02-e-14": 64 * ((4 * 1792 + 2 * 15360 + 8) * 1792 + 15360) + 260 * 1792 + (3 * 14**2 + 1) * 1792,
    "internvit-300m-448": 24 * 12_598_272 + 1025 * 1024 + 1024 + (3 * 14**2 + 1) * 1024,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_parameters_are_as_many_as_published(name):
    assert sum(map(math.prod, encoder_shapes(NAMED[name]).values())) == COUNTS[name]


WITH_CLASS = [name for name in NAMED if name != "eva02-e-14"]  # of Hugging Face


@pytest.mark.parametrize("name", WITH_CLASS)
def test_parameters_are_as_many_as_hugging_faces(name):
    c = NAMED[name]
    assert (
        sum(p.numel() for part, p in family_class(c).named_parameters() if "mask_token" not in part)
        == COUNTS[name]
    )


@pytest.mark.parametrize(
    "name", [name for name in WITH_CLASS if name not in ("dinov2-s-reg", "dinov2-b-reg")]
)
def test_two_layers_in_full_width(tmp_path, name):
    c = dataclasses.replace(NAMED[name], layers=2)
    written = preprocessor_json(c, "squash" if "siglip" in name else "crop")
    write(
        tmp_path,
        VISION_FAMILIES[written_as(c)].encoder_json(c, "bfloat16"),
        PUBLISHED.get(name, (0, written))[1],
    )
    random_file(tmp_path / "model.safetensors", family_class(c).state_dict(), looked_at)
    loads(tmp_path, c)


def looked_at(name):
    """What `loads` compares has values; other tensors are holes in the file."""
    return re.search(r"\.1\.\w*att|patch|conv1", name)


def loads(source, c, file="model.safetensors", qkv="qkv.weight"):
    """The config is right, every array is there, and some are compared with those of the file.

    These are queries, keys and values of the second layer, and the patches' kernel.
    """
    config, arrays = load_encoder(source, "image/encoders/1")
    assert config == c
    assert {path.removeprefix("image/encoders/1/"): a.shape for path, a in arrays.items()} == encoder_shapes(
        c
    )
    tensors = open_tensors(source / file if file else source)
    second = [name for name in tensors if ".1." in name]
    matrices = [np.asarray(tensors[name]) for name in second if name.endswith(qkv)]
    queries, keys, values = np.split(matrices[0], 3) if len(matrices) == 1 else order(second, tensors)
    for name, matrix in (("query", queries), ("key", keys), ("value", values)):
        ours = np.asarray(arrays[f"image/encoders/1/layers/attention/{name}/kernel"][1])
        np.testing.assert_array_equal(bits(ours.reshape(c.width, -1)[:, ::97]), bits(matrix[::97].T))
    [kernel] = [np.asarray(a) for name, a in tensors.items() if a.ndim == 4]
    np.testing.assert_array_equal(
        bits(np.asarray(arrays["image/encoders/1/patch/kernel"])[3, 5, 1]), bits(kernel[:, 1, 3, 5])
    )


def order(names, tensors):
    """Queries, keys and values where they are matrices of their own."""
    for kind in ("query", "key", "value"):
        [name] = [n for n in names if n.endswith((f"{kind}.weight", f"{kind[0]}_proj.weight"))]
        yield np.asarray(tensors[name])


def bits(a):
    return np.ascontiguousarray(a).view(np.uint16)


def on_meta(cls, c, **settings):
    with torch.device("meta"):
        return cls(c.width, 2, c.heads, c.mlp, c.patch, c.position_grid or c.side, **settings).state_dict()


def test_two_layers_of_open_clip_in_full_width(tmp_path):
    c = dataclasses.replace(NAMED["clip-vit-bigg-14"], layers=2)
    vision = {
        "image_size": 224,
        "layers": 2,
        "width": 1664,
        "head_width": 104,
        "mlp_ratio": 4.9231,
        "patch_size": 14,
    }
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 1280, "vision_cfg": vision, "text_cfg": {}}})
    )
    random_file(tmp_path / "open_clip_model.safetensors", on_meta(OpenClip, c), looked_at)
    (tmp_path / "config.json").write_text(
        '{"model_type": "clip"}'
    )  # settings of Hugging Face beside it, without its weights
    loads(tmp_path, c, "open_clip_model.safetensors", "in_proj_weight")


@pytest.mark.parametrize(
    ("name", "mode", "edge"),
    [("siglip-base-16-512", "squash", None), ("siglip-so400m-14-384", "center", 426)],  # 384 / 0.9 = 426.7
)
def test_two_layers_of_timm_in_full_width(tmp_path, name, mode, edge):
    c = dataclasses.replace(NAMED[name], layers=2, activation="gelu", position_resize="bicubic_antialias")
    size, picture = (
        name.split("-")[1],
        {"input_size": [3, c.image_size, c.image_size], "mean": HALF, "std": HALF, "crop_pct": 0.9},
    )
    settings = {
        "architecture": f"vit_{size}_patch{c.patch}_siglip_{c.image_size}",
        "pretrained_cfg": {**picture, "crop_mode": mode},
    }
    c.shortest_edge = edge
    write(tmp_path, settings)
    random_file(tmp_path / "model.safetensors", on_meta(Hub, c, siglip=True), looked_at)
    loads(tmp_path, c)


def test_two_layers_of_eva02_in_full_width(tmp_path):
    c = dataclasses.replace(NAMED["eva02-e-14"], layers=2, image_size=448, position_grid=16)
    settings = {"input_size": [3, 448, 448], "crop_pct": 1.0, "crop_mode": "center"}
    write(tmp_path, {"architecture": "eva02_enormous_patch14_clip_224", "pretrained_cfg": settings})
    random_file(tmp_path / "model.safetensors", on_meta(Eva02, c), looked_at)
    loads(tmp_path, dataclasses.replace(c, shortest_edge=None))
    with pytest.raises(CheckpointError, match="no vision model of Hugging Face computes"):
        written_as(c)


@pytest.mark.parametrize("name", ["dinov2-s", "dinov2-g", "dinov2-l-reg", "dinov2-g-reg"])
def test_two_layers_of_the_original_dinov2_in_full_width(tmp_path, name):
    """No settings are there: all are read from shapes."""
    c = dataclasses.replace(NAMED[name], layers=2)
    c.position_resize = c.position_resize if c.registers else "bicubic_offset"
    random_file(
        tmp_path / "dinov2.safetensors",
        on_meta(Hub, c, registers=c.registers, gated=c.activation == "swiglu"),
        looked_at,
    )
    loads(tmp_path / "dinov2.safetensors", c, file=None)


@pytest.mark.parametrize("name", ["internvit-6b-448", "internvit-300m-448"])
def test_two_layers_of_the_original_internvit_in_full_width(tmp_path, name):
    c = dataclasses.replace(NAMED[name], layers=2)
    config, preprocessor = PUBLISHED[name]
    write(tmp_path, {**config, "num_hidden_layers": 2}, preprocessor)
    random_file(tmp_path / "model.safetensors", on_meta(InternViT, c, rms=c.norm == "rms"), looked_at)
    loads(tmp_path, c)


def small(name, **settings):
    """A preset's kind in a size for tests."""
    c = encoder(name)
    mlp = 88 if c.activation == "swiglu" else 128
    return dataclasses.replace(c, image_size=24, patch=6, width=32, layers=2, heads=4, mlp=mlp, **settings)


@pytest.mark.parametrize("how", ["crop", "squash"])
@pytest.mark.parametrize(
    "c, family",
    [
        (small("clip-vit-l-14"), "clip"),
        (small("clip-vit-bigg-14"), "clip"),
        (small("siglip-base-16-512"), "siglip"),
        (small("dinov2-l", shortest_edge=30, position_grid=7), "dinov2"),
        (small("dinov2-g", shortest_edge=24, position_grid=4), "dinov2"),
        (small("dinov2-l-reg", shortest_edge=None, position_grid=3), "dinov2_with_registers"),
        (small("dinov2-g-reg", shortest_edge=30, position_grid=3, qkv_bias=False), "dinov2_with_registers"),
        (small("internvit-6b-448"), "internvl_vision"),
        (small("internvit-300m-448", position_grid=2), "internvl_vision"),
    ],
)
def test_hugging_face_loads_what_is_written(tmp_path, c, family, how):
    arrays = random_arrays(c)
    write_encoder(tmp_path, c, arrays, how)
    back, again = load_encoder(tmp_path)
    same(again, arrays)
    assert back == c.canonical() and written_as(c) == family and preferred_fit(tmp_path) == how
    model, about = transformers.AutoModel.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__name__ == VISION_FAMILIES[family].architecture
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
    pixels = np.random.default_rng(0).integers(0, 256, (40, 53, 3), np.uint8)
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        Image.fromarray(pixels), return_tensors="np"
    )["pixel_values"][0]
    ours = fit(Image.fromarray(pixels), c.view[0], how, c.view[1])
    np.testing.assert_allclose(((ours / 255 - c.mean) / c.std).transpose(2, 0, 1), theirs, atol=1e-5)


def test_public_names_are_written(tmp_path):
    for name, expected in {
        "clip-vit-l-14": "vision_model.encoder.layers.1.self_attn.q_proj.weight",
        "siglip-base-16-512": "vision_model.encoder.layers.1.mlp.fc1.bias",
        "dinov2-g": "encoder.layer.1.mlp.weights_in.weight",
        "dinov2-l-reg": "encoder.layer.1.attention.attention.query.bias",
        "internvit-300m-448": "encoder.layer.1.attention.projection_layer.weight",
    }.items():
        (tmp_path / name).mkdir()
        c = small(name, shortest_edge=None, position_grid=None)
        write_encoder(tmp_path / name, c, random_arrays(c))
        assert expected in read_safetensors(tmp_path / name / "model.safetensors")


def test_what_no_class_of_hugging_face_computes_is_not_written():
    message = (
        r"no vision model of Hugging Face.*\n  clip: .*\n  siglip: (.*\n)*.*"
        r"dinov2: position_resize would be bicubic"
    )
    with pytest.raises(CheckpointError, match=message):
        written_as(dataclasses.replace(NAMED["dinov2-l"], position_resize="bicubic_offset"))
    assert (
        written_as(
            dataclasses.replace(
                NAMED["dinov2-l"], position_resize="bicubic_offset", image_size=518, shortest_edge=518
            )
        )
        == "dinov2"
    )
    with pytest.raises(CheckpointError, match=r"dinov2: mlp would be 4096"):
        written_as(dataclasses.replace(NAMED["dinov2-l"], mlp=4000))


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("clip-vit-l-14", {"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
        ("siglip-base-16-512", {"vision_config": {"num_channels": 1}}, "num_channels is 1"),
        ("dinov2-l", {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ("dinov2-l", {"image_size": [518, 224]}, r"image_size is \[518, 224\], not of type int"),
        ("dinov2-l-reg", {"quantization_config": {"bits": 8}}, "the weights are quantized"),
        ("internvit-6b-448", {"use_moe": True}, "use_moe is True, supported is False"),
        (
            "internvit-6b-448",
            {"norm_type": "batch_norm"},
            "norm_type is 'batch_norm', supported is 'layer_norm' or 'rms_norm'",
        ),
        ("internvl", {"use_mean_pooling": False}, "use_mean_pooling is False, supported is True"),
        (
            "internvl",
            {"use_absolute_position_embeddings": False},
            "use_absolute_position_embeddings is False",
        ),
        (
            "internvl",
            {"use_qk_norm": True, "layer_norm_eps": 1e-5},
            "layer_norm_eps is 1e-05, supported is 1e-06",
        ),
    ],
)
def test_settings_we_do_not_have_are_refused_by_name(tmp_path, name, change, said):
    config = {
        "internvl": {"model_type": "internvl_vision"},
        **{name: config for name, (config, _) in PUBLISHED.items()},
    }[name]
    write(tmp_path, {**config, **change})
    with pytest.raises(CheckpointError, match=f"{tmp_path}/config.json.*{said}"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"resample": 2}, "resample is 2, supported is 3"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"size": {"height": 224, "width": 200}}, "make no square"),
        ({"do_center_crop": False}, "do_center_crop is False"),
        ({"size": {"longest_edge": 224}}, "make no square"),
    ],
)
def test_other_pictures_are_refused(tmp_path, change, said):
    config, preprocessor = PUBLISHED["dinov2-l"]
    write(tmp_path, config, {**preprocessor, **change})
    with pytest.raises(CheckpointError, match=said):
        load_encoder(tmp_path)


def test_open_clip_is_refused_where_its_settings_are_not_there_or_not_ours(tmp_path):
    c = small("clip-vit-l-14")
    random_file(tmp_path / "open_clip_model.safetensors", on_meta(OpenClip, c))
    with pytest.raises(
        CheckpointError, match=r"do not say their heads and activation. Put open_clip_config.json"
    ):
        load_encoder(tmp_path / "open_clip_model.safetensors")
    for change, said in (
        ({"timm_model_name": "vit_base_patch16_siglip_512"}, "timm_model_name is 'vit_base"),
        ({"pos_embed_type": "sin_cos_2d"}, "pos_embed_type is 'sin_cos_2d', supported is 'learnable'"),
        ({"ls_init_value": 1e-5}, "ls_init_value is 1e-05"),
        ({}, "vision_cfg has no layers, patch_size, width"),
    ):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": change}}))
        with pytest.raises(CheckpointError, match=said):
            load_encoder(tmp_path)


def test_timm_is_refused_where_it_computes_something_else(tmp_path):
    for change, said in (
        (
            {"architecture": "vit_giantopt_patch16_siglip_384"},
            "'giantopt', supported is 'base' or 'large' or 'so400m'",
        ),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode is 'border'"),
        ({"model_args": {"act_layer": "gelu_tanh"}}, "model_args is"),
    ):
        write(tmp_path, {"architecture": "vit_base_patch16_siglip_512", **change})
        with pytest.raises(CheckpointError, match=said):
            load_encoder(tmp_path)


def test_what_is_no_vision_model(tmp_path):
    write(tmp_path, {"model_type": "mistral"})
    message = (
        r"no vision model of a known family \(.*"
        r"clip: config.json of type clip or clip_vision_model; .*dinov2_hub: "
    )
    with pytest.raises(CheckpointError, match=message):
        load_encoder(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"lm_head.weight": np.zeros((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match="no vision model"):
        load_encoder(tmp_path / "model.safetensors")


def test_missing_and_extra_tensors_of_packed_files_are_listed(tmp_path):
    c = small("dinov2-s", shortest_edge=None, position_grid=4)
    tensors = on_meta(Hub, dataclasses.replace(c, width=64))
    tensors["blocks.1.attn.kqv.weight"] = tensors.pop("blocks.1.attn.qkv.weight")
    random_file(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"2 tensors do not fit") as caught:
        load_encoder(tmp_path / "a.safetensors")
    place = " and ".join(
        f"image/encoders/0/layers/attention/{name}/kernel[1]" for name in ("query", "key", "value")
    )
    assert f"blocks.1.attn.qkv.weight -> {place}: missing" in str(caught.value)
    assert "blocks.1.attn.kqv.weight -> nowhere" in str(caught.value)


def test_the_same_weights_serve_pictures_of_another_size(tmp_path):
    from omnifusion_jax.run import starting_point

    c = small("dinov2-l", shortest_edge=30, position_grid=7)
    write_encoder(tmp_path, c, random_arrays(c))
    ours = dataclasses.replace(c, image_size=48, shortest_edge=None, feature_layer=-1)
    config = TrainConfig(
        model=ModelConfig(image=ImageConfig((ours,))),
        parts_from={"image/encoders/0": str(tmp_path)},
        objective="patches",
    )
    assert starting_point(config)[0]["image/encoders/0/position"].shape == (50, 32)
    for change in ({"position_grid": 8}, {"position_grid": None}):
        config.model.image.encoders = (dataclasses.replace(ours, **change),)
        with pytest.raises(ConfigError, match=r"--config.model.image.encoders.0.position_grid=7"):
            starting_point(config)
    write_encoder(
        tmp_path,
        dataclasses.replace(c, image_size=42, shortest_edge=None, position_grid=None),
        random_arrays(c),
    )
    with pytest.raises(
        ConfigError, match=r"--config.model.image.encoders.0.position_grid=7"
    ):  # where the file's own size is that of its positions
        starting_point(config)
    config.model.image.encoders = (ours,)
    assert starting_point(config)[0]["image/encoders/0/position"].shape == (50, 32)
    config.model.image.encoders = (dataclasses.replace(ours, mean=HALF),)
    with pytest.raises(ConfigError, match=r"--config.model.image.encoders.0.mean=\(0.485"):
        starting_point(config)


def test_a_release_with_another_encoder(source, tmp_path):
    """The original directory, with a SigLIP instead of its CLIP, read and written."""
    e = tiny.config().image.encoders[0]
    c = small("siglip-base-16-512")
    c = dataclasses.replace(c, image_size=18, width=e.width, heads=e.heads, layers=e.layers, mlp=e.mlp)
    arrays = random_arrays(c)
    (tmp_path / "vision").mkdir()
    write_encoder(tmp_path / "vision", c, arrays, "squash")
    checkpoint = load_checkpoint(source, vision=tmp_path / "vision")
    assert checkpoint.config.image.encoders == (c,) and checkpoint.config.image.fit == "squash"
    export_original(checkpoint, tmp_path / "written", pickles=False)
    assert (tmp_path / "written/siglip/config.json").is_file()
    again = load_checkpoint(tmp_path / "written")
    assert again.config == checkpoint.config
    same({path: a for path, a in again.arrays.items() if path.startswith("image/encoders/")}, arrays)


def test_one_file_may_be_the_encoder_of_a_release(source, tmp_path):
    c = dataclasses.replace(small("dinov2-s"), width=64, heads=1, mlp=128, patch=14, position_grid=20)
    random_file(tmp_path / "dinov2.safetensors", on_meta(Hub, c))
    with pytest.raises(
        CheckpointError, match="made for 9 rows a picture"
    ):  # the adapter is for 32 channels: the encoder itself was read
        load_checkpoint(source, vision=tmp_path / "dinov2.safetensors")
    said = r"dinov2\.safetensors: a vision tower alone.*\.convert --vision=/.*/dinov2\.safetensors --decoder="
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(tmp_path / "dinov2.safetensors")


def test_every_written_family_is_a_family():
    assert set(WRITTEN) < set(VISION_FAMILIES)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_a_family_keeps_its_contract(name):
    family = VISION_FAMILIES[name]
    assert isinstance(family.known_by, str)
    for method in ("knows", "settings", "read"):
        wanted, found = (inspect.signature(getattr(kind, method)) for kind in (EncoderFamily, type(family)))
        assert list(wanted.parameters) == list(found.parameters), method
