"""SigLIP as timm stores and computes it.

timm has the exact GELU and resizes positions with antialiasing. Hugging Face, like the original in JAX, has
the tanh form of GELU and no antialiasing.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.encoders.base import QKV, Family, named
from omnifusion_jax.checkpoints.storage.settings import read_json, require
from omnifusion_jax.config import HALF, EncoderConfig
from omnifusion_jax.errors import CheckpointError

MLP = {"fc1": "layers/feed_forward/up", "fc2": "layers/feed_forward/down"}
GATED = {"w12": ("layers/feed_forward/gate", "layers/feed_forward/up"), "w3": "layers/feed_forward/down"}

ARCHITECTURE = r"vit_(\w+?)_patch\d+_siglip_\d+"
# By the size in the architecture's name, because the shapes of tensors do not say it.
HEADS = {"base": 12, "large": 16, "so400m": 16}
FITS = {"center": "crop", "squash": "squash"}


def names(c: EncoderConfig):
    """Tensor names of timm's vision transformers, and of the original DINOv2, whose code began as timm's."""
    mlp = GATED if c.activation == "swiglu" else MLP
    block = "blocks.{}."
    return named(
        tensors={
            "cls_token": "class_token",
            "register_tokens": "registers",
            "pos_embed": "position",
            block + "ls1.gamma": "layers/scale1",
            block + "ls2.gamma": "layers/scale2",
        },
        linear={
            "patch_embed.proj": "patch",
            block + "attn.qkv": QKV,
            block + "attn.proj": "layers/attention/out",
            **{block + "mlp." + name: ours for name, ours in mlp.items()},
        },
        norms={block + "norm1": "layers/norm1", block + "norm2": "layers/norm2", "norm": "post_norm"},
    )


def sizes(tensors: Mapping[str, np.ndarray], where: str | Path) -> dict[str, int]:
    """The fields of EncoderConfig that follow from the shapes of tensors.

    Raises:
      CheckpointError: a tensor whose shape is needed is missing, or fc2 and w3 are both there.
    """
    names = [name for name in ("blocks.0.mlp.fc2.weight", "blocks.0.mlp.w3.weight") if name in tensors]
    if len(names) != 1 or not {"patch_embed.proj.weight", "pos_embed"} <= set(tensors):
        raise CheckpointError(
            f"{where}: patch_embed.proj.weight, pos_embed, "
            "and blocks.0.mlp.fc2.weight or .w3.weight must be there"
        )
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    blocks = {found[1] for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
    # Rounding down leaves out the row of the class token, where there is one.
    grid = math.isqrt(tensors["pos_embed"].shape[1])
    return {
        "width": width,
        "patch": patch,
        "layers": len(blocks),
        "mlp": tensors[names[0]].shape[1],
        "position_grid": grid,
    }


@dataclasses.dataclass(frozen=True)
class Timm(Family):
    """A directory of timm. Heads come from the architecture's name, the pixels from its settings, other
    sizes from shapes of tensors.
    """

    known_by = "config.json with timm's architecture vit_..._siglip_..."

    def knows(self, path):
        file = path / "config.json"
        return file.is_file() and bool(re.fullmatch(ARCHITECTURE, str(read_json(file).get("architecture"))))

    def settings(self, path):
        where = path / "config.json"
        settings = read_json(where)
        name = re.fullmatch(ARCHITECTURE, settings["architecture"])[1]
        c = settings.get("pretrained_cfg", {})
        require({"architecture's size": name}, {"architecture's size": tuple(HEADS)}, where)
        require(settings, {"model_args": ({}, None)}, where)
        require(c, {"interpolation": ("bicubic",), "crop_mode": tuple(FITS)}, where)
        fit = FITS[c.get("crop_mode", "center")]
        _, size, _ = c.get("input_size", (3, 224, 224))
        config = EncoderConfig(
            **sizes(self.tensors(path), where),
            **FIXED,
            image_size=size,
            heads=HEADS[name],
            mean=tuple(c.get("mean", HALF)),
            std=tuple(c.get("std", HALF)),
        )
        if fit == "crop":  # crop_pct is the share of the shortest edge that is kept
            config.shortest_edge = math.floor(size / c.get("crop_pct", 1.0))
        config.validate()
        return config.canonical(), fit


FIXED = {
    "activation": "gelu",
    "eps": 1e-6,
    "class_token": False,
    "patch_bias": True,
    "pre_norm": False,
    "position_resize": "bicubic_antialias",
}
TIMM_SIGLIP = Timm(styles=lambda c: (names(c),), ignored=(r"attn_pool\..*", r"head\..*"), batched=True)
