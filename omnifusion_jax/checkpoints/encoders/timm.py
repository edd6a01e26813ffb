"""SigLIP and EVA02-E (arXiv 2303.15389) as timm stores and computes them.

timm has the exact GELU and resizes positions with antialiasing. Of SigLIP Hugging Face, like the original in
JAX, has the tanh form of GELU and no antialiasing.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.encoders.base import QKV_BIAS, QKV_KERNEL, Family, named
from omnifusion_jax.checkpoints.storage.settings import read_json, require
from omnifusion_jax.config import CLIP_MEAN, CLIP_STD, HALF, EncoderConfig
from omnifusion_jax.errors import CheckpointError

MLP = {"fc1": "layers/feed_forward/up", "fc2": "layers/feed_forward/down"}
GATED = {"w12": ("layers/feed_forward/gate", "layers/feed_forward/up"), "w3": "layers/feed_forward/down"}

FITS = {"center": "crop", "squash": "squash"}


def names(c: EncoderConfig):
    """Tensor names of timm's vision transformers, and of the original DINOv2, whose code began as timm's."""
    mlp = GATED if c.activation == "swiglu" else MLP
    block = "blocks.{}."
    query, _, value = QKV_BIAS
    biases = {"qkv.bias": QKV_BIAS} if c.key_bias else {"q_bias": query, "v_bias": value}
    return named(
        tensors={
            "cls_token": "class_token",
            "register_tokens": "registers",
            "pos_embed": "position",
            block + "attn.qkv.weight": QKV_KERNEL,
            **{f"{block}attn.{name}": ours for name, ours in biases.items()},
            block + "ls1.gamma": "layers/scale1",
            block + "ls2.gamma": "layers/scale2",
        },
        linear={
            "patch_embed.proj": "patch",
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

    known_by: str = ""
    architecture: str = ""  # regex of the architectures; its group is what `heads` lists
    # By what the architecture's name says, because the shapes of tensors do not say it.
    heads: dict = dataclasses.field(default_factory=dict)
    fixed: dict = dataclasses.field(default_factory=dict)  # fields of EncoderConfig that all of them share

    def knows(self, path):
        file = path / "config.json"
        return file.is_file() and bool(
            re.fullmatch(self.architecture, str(read_json(file).get("architecture")))
        )

    def settings(self, path):
        where = path / "config.json"
        settings = read_json(where)
        name = re.fullmatch(self.architecture, settings["architecture"])[1]
        c = settings.get("pretrained_cfg", {})
        require({"architecture's size": name}, {"architecture's size": tuple(self.heads)}, where)
        require(settings, {"model_args": ({}, None)}, where)
        require(c, {"interpolation": ("bicubic",), "crop_mode": tuple(FITS)}, where)
        fit = FITS[c.get("crop_mode", "center")]
        _, size, _ = c.get("input_size", (3, 224, 224))
        config = self.encoder_config(self.tensors(path), where, heads=self.heads[name], image_size=size)
        config.mean, config.std = (tuple(c.get(kind, getattr(config, kind))) for kind in ("mean", "std"))
        if fit == "crop":  # crop_pct is the share of the shortest edge that is kept
            config.shortest_edge = math.floor(size / c.get("crop_pct", 1.0))
        config.validate()
        return config.canonical(), fit

    def encoder_config(self, tensors: Mapping[str, np.ndarray], where: str | Path, **more) -> EncoderConfig:
        """The config whose sizes follow from the shapes of tensors, and what they do not say is `more`.

        Raises:
          CheckpointError: a tensor whose shape is needed is missing.
        """
        return EncoderConfig(**{**sizes(tensors, where), **self.fixed, **more})


SHARED = {"activation": "gelu", "eps": 1e-6, "patch_bias": True, "pre_norm": False}
SHARED["position_resize"] = "bicubic_antialias"
TIMM_SIGLIP = Timm(
    styles=lambda c: (names(c),),
    ignored=(r"attn_pool\..*", r"head\..*"),
    batched=True,
    known_by="config.json with timm's architecture vit_..._siglip_...",
    architecture=r"vit_(\w+?)_patch\d+_siglip_\d+",
    heads={"base": 12, "large": 16, "so400m": 16},
    fixed={**SHARED, "class_token": False, "mean": HALF, "std": HALF},
)
TIMM_EVA02 = Timm(  # the others of this name turn queries and keys, and norm within the feed-forward part
    styles=lambda c: (names(c),),
    ignored=(r"head\..*",),
    batched=True,
    known_by="config.json with timm's architecture eva02_enormous_..._clip_...",
    architecture=r"eva02_(enormous)_patch\d+_clip_\d+",
    heads={"enormous": 16},
    fixed={**SHARED, "norm_order": "post", "key_bias": False, "mean": CLIP_MEAN, "std": CLIP_STD},
)
