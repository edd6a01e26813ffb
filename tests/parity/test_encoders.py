"""Every hidden state of vision transformers of every family, in float32.

They are compared with those of transformers' classes, or of a reference of our own.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from parity.torch_models import pixels, randomised
from parity.vision_models import Described, Eva02, Hub, InternViT, OpenClip
from torch.nn import functional

from omnifusion_jax.checkpoints.encoders.timm import TIMM_SIGLIP
from omnifusion_jax.checkpoints.load import load_encoder
from omnifusion_jax.checkpoints.mapping.shapes import encoder_shapes
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.config import CLIP_MEAN, HALF, EncoderConfig, ImageConfig, ModelConfig
from omnifusion_jax.data.slices import in_patches
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.resize import RESIZE, resize_matrix

PATCH, GRID = 6, 5  # of the tiny models; their pictures have 30 pixels a side where nothing else is said
COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": PATCH * GRID,
    "patch_size": PATCH,
}
TINY = {"width": 48, "layers": 2, "heads": 4, "mlp": 80, "patch": PATCH, "grid": GRID}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def compare(source, states_of, **expected):
    """Loads our model from `source`, checks its settings, and compares what both make of two pictures."""
    config, arrays = load_encoder(source)
    assert {name: getattr(config, name) for name in expected} == expected
    empty = nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    model = nnx.with_parameters(
        empty, {path.removeprefix("image/encoders/0/"): jnp.asarray(a) for path, a in arrays.items()}
    )
    images = np.random.default_rng(3).integers(0, 256, (2, config.image_size, config.image_size, 3), np.uint8)
    with torch.no_grad():
        theirs = states_of(pixels(config, images))
    ours = jax.jit(VisionTransformer.hidden_states)(model, images)
    assert len(ours) == len(theirs) == config.layers + 1
    for mine, state in zip(ours, theirs, strict=True):
        close(mine, state)
    close(
        model.features(ours[config.feature_layer]),
        theirs[config.feature_layer][:, config.class_token + config.registers :],
    )
    return model, images


def save(directory, cls, config, seed=0, size=None, **settings):
    """A random model of transformers in a directory, with a preprocessor for pictures of `size` pixels."""
    model = randomised(cls(config(**COMMON, **settings, attn_implementation="eager")), seed)
    model.save_pretrained(directory)
    if size:
        (directory / "preprocessor_config.json").write_text(
            json.dumps({"size": {"shortest_edge": size + 4}, "crop_size": size})
        )
    return model


def states(model, **settings):
    return lambda x: model(x, output_hidden_states=True, **settings).hidden_states


@pytest.mark.parametrize("hidden_act, activation", [("quick_gelu", "quick_gelu"), ("gelu", "gelu")])
def test_clip(tmp_path, hidden_act, activation):
    model = save(
        tmp_path,
        transformers.CLIPVisionModel,
        transformers.CLIPVisionConfig,
        intermediate_size=80,
        hidden_act=hidden_act,
    )
    compare(tmp_path, states(model), activation=activation, class_token=True, eps=1e-5)


@pytest.mark.parametrize("hidden_act, activation", [("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu")])
def test_siglip(tmp_path, hidden_act, activation):
    model = save(
        tmp_path,
        transformers.SiglipVisionModel,
        transformers.SiglipVisionConfig,
        intermediate_size=80,
        hidden_act=hidden_act,
    )
    compare(tmp_path, states(model), activation=activation, class_token=False, eps=1e-6, mean=(0.5, 0.5, 0.5))


def test_pixels_of_less_than_a_patch_are_not_seen(tmp_path):
    """SigLIP so400m: 384 pixels are 27 patches of 14, and 6 pixels."""
    settings = COMMON | {"image_size": PATCH * GRID + 4}
    model = randomised(
        transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**settings, intermediate_size=80)), 0
    )
    model.save_pretrained(tmp_path)
    compare(tmp_path, states(model), image_size=34, patches=25)


def test_post_norm_of_features(tmp_path):
    theirs = save(
        tmp_path, transformers.SiglipVisionModel, transformers.SiglipVisionConfig, intermediate_size=80
    )
    model, images = compare(tmp_path, states(theirs))
    model.config.feature_layer, model.config.feature_norm = -1, True
    close(model(images), theirs(pixels(model.config, images)).last_hidden_state)


def test_layers_are_counted_from_either_end(tmp_path):
    """As states are: 0 and -3 are what enters the first of two blocks."""
    theirs = save(
        tmp_path, transformers.SiglipVisionModel, transformers.SiglipVisionConfig, intermediate_size=80
    )
    model, images = compare(tmp_path, states(theirs))
    with torch.no_grad():
        every = states(theirs)(pixels(model.config, images))
    for layer in (0, 1, -3):
        model.config.feature_layer = layer
        close(model(images), every[layer])


@pytest.mark.parametrize("size", [None, PATCH * 3, PATCH * 8])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2(tmp_path, size, gated):
    model = save(
        tmp_path, transformers.Dinov2Model, transformers.Dinov2Config, size=size, use_swiglu_ffn=gated
    )
    compare(
        tmp_path,
        states(model),
        mlp=128 if gated else 192,
        resized=bool(size),
        shortest_edge=size and size + 4,
    )


@pytest.mark.parametrize("size", [None, PATCH * 3, PATCH * 8])
def test_dinov2_with_registers(tmp_path, size):
    model = save(
        tmp_path,
        transformers.Dinov2WithRegistersModel,
        transformers.Dinov2WithRegistersConfig,
        size=size,
        num_register_tokens=3,
    )
    compare(tmp_path, states(model), registers=3, position_resize="bicubic_antialias")


@pytest.mark.parametrize("cls", [transformers.Dinov2Model, transformers.Dinov2WithRegistersModel])
def test_names_that_transformers_5_has_in_memory(tmp_path, cls):
    model = save(tmp_path, cls, cls.config_class, use_swiglu_ffn=True)
    assert (
        "encoder.layer.0.attention.q_proj.weight" in model.state_dict()
        and "encoder.layer.0.mlp.gate_proj.bias" in model.state_dict()
    )
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    compare(tmp_path, states(model), activation="swiglu")


@pytest.mark.parametrize("size", [None, PATCH * 7])
@pytest.mark.parametrize("rms", [True, False])
def test_internvl_vision(tmp_path, rms, size):
    settings = {"norm_type": "rms_norm", "use_qk_norm": True} if rms else {"attention_bias": True}
    model = save(
        tmp_path,
        transformers.InternVLVisionModel,
        transformers.InternVLVisionConfig,
        intermediate_size=80,
        size=size,
        **settings,
    )
    compare(
        tmp_path,
        states(model),
        norm="rms" if rms else "layer",
        qk_norm=rms,
        qkv_bias=not rms,
        feature_layer=-1,
    )


@pytest.mark.parametrize("quick", [False, True])
def test_open_clip(tmp_path, quick):
    """Heads of 16 and a feed-forward part of 2.5 times the width: what it says is used, not its defaults."""
    model = randomised(OpenClip(**TINY | {"heads": 3, "mlp": 120}, quick=quick), 0)
    vision = {
        "image_size": 30,
        "patch_size": PATCH,
        "width": 48,
        "layers": 2,
        "head_width": 16,
        "mlp_ratio": 2.5,
    }
    settings = {
        "model_cfg": {"embed_dim": 8, "quick_gelu": quick, "vision_cfg": vision},
        "preprocess_cfg": {**HALVES, "resize_mode": "squash"},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    for source in (tmp_path, tmp_path / "open_clip_pytorch_model.bin"):
        compare(
            source,
            model,
            activation="quick_gelu" if quick else "gelu",
            mean=(0.5, 0.5, 0.5),
            heads=3,
            mlp=120,
        )


@pytest.mark.parametrize("size", [PATCH * GRID, PATCH * 8])
def test_timm_siglip(tmp_path, size):
    model = randomised(Hub(**TINY | {"width": 192, "heads": 12}, siglip=True), 0)
    settings = {
        "architecture": "vit_base_patch16_siglip_512",
        "pretrained_cfg": {"input_size": [3, size, size], "crop_mode": "squash", **HALVES},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    compare(tmp_path, model, activation="gelu", position_resize="bicubic_antialias", heads=12)


@pytest.mark.parametrize("size", [PATCH * GRID, PATCH * 10])  # OmniLMM doubles the grid
def test_timm_eva02(tmp_path, size):
    theirs = randomised(Eva02(**TINY | {"width": 64, "heads": 16}), 0)
    settings = {
        "architecture": "eva02_enormous_patch14_clip_224",
        "pretrained_cfg": {"input_size": [3, size, size]},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    model, images = compare(
        tmp_path,
        theirs,
        activation="gelu",
        norm_order="post",
        key_bias=False,
        heads=16,
        position_resize="bicubic_antialias",
        mean=CLIP_MEAN,
    )
    model.config.feature_layer, model.config.feature_norm = -1, True  # what OmniLMM reads
    close(model(images), theirs.norm(theirs(pixels(model.config, images))[-1])[:, 1:])


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_of_the_original_code(tmp_path, gated, registers):
    """A grid of 20 patches is brought to the 16 of 224 pixels."""
    model = randomised(
        Hub(**TINY | {"width": 128, "heads": 2, "patch": 14, "grid": 20}, registers=registers, gated=gated), 0
    )
    torch.save(model.state_dict(), tmp_path / "dinov2_vits14_pretrain.pth")
    resize = "bicubic_antialias" if registers else "bicubic_offset"
    compare(
        tmp_path / "dinov2_vits14_pretrain.pth",
        model,
        heads=2,
        mlp=80,
        registers=registers,
        position_grid=20,
        position_resize=resize,
    )


@pytest.mark.parametrize("rms", [True, False])
def test_internvit_of_the_original_code(tmp_path, rms):
    model = randomised(InternViT(**TINY, rms=rms), 0)
    settings = {
        "norm_type": "rms_norm" if rms else "layer_norm",
        "qk_normalization": rms,
        "qkv_bias": not rms,
        "intermediate_size": 80,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "intern_vit_6b", **COMMON, **settings}))
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    compare(tmp_path, model, norm="rms" if rms else "layer", qk_norm=rms, qkv_bias=not rms)


TORCH = {
    "bicubic": lambda x, n: functional.interpolate(x, size=(n, n), mode="bicubic"),
    "bicubic_antialias": lambda x, n: functional.interpolate(x, size=(n, n), mode="bicubic", antialias=True),
    "bicubic_offset": lambda x, n: functional.interpolate(
        x, scale_factor=(n + 0.1) / x.shape[-1], mode="bicubic"
    ),
    "bilinear": lambda x, n: functional.interpolate(x, size=(n, n), mode="bilinear"),
}


@pytest.mark.parametrize("how", RESIZE)
@pytest.mark.parametrize("old, new", [(37, 16), (37, 24), (16, 32), (27, 32), (5, 7), (7, 2), (24, 16)])
def test_resampling(how, old, new):
    x = torch.randn(1, 2, old, old, generator=torch.Generator().manual_seed(old))
    matrix = resize_matrix(old, new, how)
    close(np.einsum("ip,jq,bcpq->bcij", matrix, matrix, x.numpy()), TORCH[how](x, new))


def own_arrays(c):
    """Random parameters of an encoder, by path within it."""
    part = "image/encoders/0"
    return {
        path.removeprefix(f"{part}/"): a
        for path, a in tiny.arrays(ModelConfig(image=ImageConfig((c,))), part).items()
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_order": "post", "key_bias": False},
        {"rope_theta": 100.0, "rope_grid": 2, "registers": 2},
        {"rope_theta": 100.0, "rope_grid": 3, "norm_order": "post"},  # the grid of this image size
    ],
    ids=lambda s: " ".join(s),
)
def test_what_eva_does_otherwise(settings):
    c = EncoderConfig(
        image_size=18, patch=6, width=48, layers=2, heads=4, mlp=80, activation="gelu", **settings
    )
    arrays = own_arrays(c)
    assert ("layers/attention/key/bias" in arrays) is c.key_bias and "layers/attention/query/bias" in arrays
    model = nnx.with_parameters(
        nnx.eval_shape(lambda: VisionTransformer(c, rngs=nnx.Rngs(0))),
        {p: jnp.asarray(a) for p, a in arrays.items()},
    )
    images = np.random.default_rng(3).integers(0, 256, (2, 18, 18, 3), np.uint8)
    ours, theirs = (
        jax.jit(VisionTransformer.hidden_states)(model, images),
        Described(c, arrays)(pixels(c, images)),
    )
    assert len(ours) == len(theirs) == 3
    for mine, state in zip(ours, theirs, strict=True):
        close(mine, state)


def test_rotary_positions_count_in_patches_of_this_image_size_unless_told_otherwise():
    c = EncoderConfig(image_size=18, patch=6, width=16, layers=1, heads=2, mlp=16, rope_theta=100.0)
    arrays = {path: jnp.asarray(a) for path, a in own_arrays(c).items()}
    images = np.random.default_rng(3).integers(0, 256, (1, 18, 18, 3), np.uint8)

    def last(**settings):
        empty = nnx.eval_shape(
            lambda: VisionTransformer(dataclasses.replace(c, **settings), rngs=nnx.Rngs(0))
        )
        return np.asarray(
            jax.jit(VisionTransformer.hidden_states)(nnx.with_parameters(empty, arrays), images)[-1]
        )

    np.testing.assert_array_equal(last(), last(rope_grid=3))
    assert (
        np.abs(last() - last(rope_grid=2)).max() > 1e-4
        and np.abs(last() - last(rope_theta=None)).max() > 1e-4
    )


def test_pictures_of_any_shape():
    """Each as timm encodes it alone; in larger and in smaller grids than that of the positions, and in it."""
    shapes = [(4, 7), (5, 5), (1, 11), (3, 2), (8, 4)]  # of patches
    theirs = randomised(Hub(**TINY, siglip=True), 0)
    c = EncoderConfig(
        image_size=30, patch=PATCH, width=48, layers=2, heads=4, mlp=80, activation="gelu", eps=1e-6,
        class_token=False, patch_bias=True, pre_norm=False, position_resize="bicubic_antialias", budget=36,
        mean=HALF, std=HALF,
    )  # fmt: skip
    tensors = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    shapes_of = {f"image/encoders/0/{path}": shape for path, shape in encoder_shapes(c).items()}
    arrays = from_foreign(tensors, TIMM_SIGLIP.table(c), shapes_of, "here", ignore=TIMM_SIGLIP.ignored)
    model = nnx.with_parameters(
        nnx.eval_shape(lambda: VisionTransformer(c, rngs=nnx.Rngs(0))),
        {path.removeprefix("image/encoders/0/"): jnp.asarray(a) for path, a in arrays.items()},
    )
    rng = np.random.default_rng(3)
    images = [rng.integers(0, 256, (h * PATCH, w * PATCH, 3), np.uint8) for h, w in shapes]
    blank = np.zeros((36, 3 * PATCH**2 + 1), np.uint8)  # what fills a pool up
    media = np.stack([*(in_patches(image, PATCH, 36) for image in images), blank])
    ours = jax.jit(VisionTransformer.hidden_states)(model, media)
    assert len(ours) == 3 and np.isfinite(ours).all()
    for i, (image, (height, width)) in enumerate(zip(images, shapes, strict=True)):
        with torch.no_grad():
            states = theirs(pixels(c, image[None]))
        for mine, state in zip(ours, states, strict=True):
            close(mine[i, : height * width], state[0])

    def touched(media):  # what stands where there is no patch changes nothing
        return jax.jit(VisionTransformer.hidden_states)(model, media)[-1]

    noise = np.where(media[..., -1:] == 0, 7, media)
    noise[..., -1] = media[..., -1]
    np.testing.assert_allclose(touched(noise)[0, :28], touched(media)[0, :28], rtol=0, atol=1e-6)
