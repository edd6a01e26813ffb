"""Published vision transformers by name."""

import dataclasses
from functools import partial

from omnifusion_jax.config import HALF, IMAGENET_MEAN, IMAGENET_STD, EncoderConfig
from omnifusion_jax.errors import ConfigError

CLIP = EncoderConfig  # its defaults are CLIP's
SIGLIP = partial(
    EncoderConfig,
    activation="gelu_tanh",
    eps=1e-6,
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    mean=HALF,
    std=HALF,
)
DINOV2 = partial(
    EncoderConfig,
    image_size=224,
    shortest_edge=256,
    activation="gelu",
    eps=1e-6,
    patch_bias=True,
    layer_scale=True,
    pre_norm=False,
    position_grid=37,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
INTERN = partial(
    EncoderConfig,
    image_size=448,
    activation="gelu",
    eps=1e-6,
    patch_bias=True,
    layer_scale=True,
    pre_norm=False,
    post_norm=False,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    feature_layer=-1,
)
EVA02 = partial(  # as timm computes it
    EncoderConfig,
    image_size=224,
    activation="gelu",
    norm_order="post",
    eps=1e-6,
    patch_bias=True,
    key_bias=False,
    pre_norm=False,
    position_resize="bicubic_antialias",
)
SMALL = {"width": 384, "heads": 6, "mlp": 1536, "layers": 12}
BASE = {"width": 768, "heads": 12, "mlp": 3072, "layers": 12}
LARGE = {"width": 1024, "heads": 16, "mlp": 4096, "layers": 24}
GIANT = {"width": 1536, "heads": 24, "mlp": 4096, "layers": 40, "activation": "swiglu"}
SHAPE400M = {"width": 1152, "heads": 16, "mlp": 4304, "layers": 27}
BIGG = {"width": 1664, "heads": 16, "mlp": 8192, "layers": 48}
ENORMOUS = {"width": 1792, "heads": 16, "mlp": 15360, "layers": 64}
DINOV2_SIZES = {"s": SMALL, "b": BASE, "l": LARGE, "g": GIANT}

PUBLISHED = {
    "clip-vit-l-14-336": CLIP(**LARGE),
    "clip-vit-l-14": CLIP(image_size=224, **LARGE),
    "clip-vit-b-16": CLIP(image_size=224, patch=16, **BASE),
    "clip-vit-b-32": CLIP(image_size=224, patch=32, **BASE),
    "clip-vit-bigg-14": CLIP(image_size=224, activation="gelu", **BIGG),
    "siglip-base-16-512": SIGLIP(image_size=512, patch=16, **BASE),
    "siglip-so400m-14-384": SIGLIP(image_size=384, **SHAPE400M),
    "eva02-e-14": EVA02(**ENORMOUS),
    **{f"dinov2-{size}": DINOV2(**dims) for size, dims in DINOV2_SIZES.items()},
    **{
        f"dinov2-{size}-reg": DINOV2(registers=4, position_resize="bicubic_antialias", **dims)
        for size, dims in DINOV2_SIZES.items()
    },
    "internvit-6b-448": INTERN(
        width=3200, heads=25, mlp=12800, layers=45, norm="rms", qkv_bias=False, qk_norm=True
    ),
    "internvit-300m-448": INTERN(**LARGE),
}


def encoder(name: str) -> EncoderConfig:
    """A fresh EncoderConfig that the caller may change.

    Raises:
      ConfigError: the name is unknown.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"there is no encoder {name!r}; choose from {', '.join(PUBLISHED)}")
    return dataclasses.replace(PUBLISHED[name])
