"""CLIP as open_clip stores it: open_clip_config.json beside one file of weights."""

import dataclasses
from pathlib import Path

from omnifusion_jax.checkpoints.encoders.base import QKV_BIAS, QKV_KERNEL, Family, named
from omnifusion_jax.checkpoints.storage.settings import read_json, require
from omnifusion_jax.checkpoints.storage.weights import WEIGHTS as HUGGING_FACE
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import CLIP_MEAN, CLIP_STD, EncoderConfig
from omnifusion_jax.errors import CheckpointError

CONFIG = "open_clip_config.json"
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
BLOCK = "visual.transformer.resblocks.{}."
NAMES = named(
    tensors={
        "visual.class_embedding": "class_token",
        "visual.positional_embedding": "position",
        "visual.conv1.weight": "patch/kernel",
        BLOCK + "attn.in_proj_weight": QKV_KERNEL,
        BLOCK + "attn.in_proj_bias": QKV_BIAS,
    },
    linear={
        BLOCK + "attn.out_proj": "layers/attention/out",
        BLOCK + "mlp.c_fc": "layers/feed_forward/up",
        BLOCK + "mlp.c_proj": "layers/feed_forward/down",
    },
    norms={
        "visual.ln_pre": "pre_norm",
        "visual.ln_post": "post_norm",
        BLOCK + "ln_1": "layers/norm1",
        BLOCK + "ln_2": "layers/norm2",
    },
)
IGNORED = (
    r"visual\.proj",
    r"(text\.)?(transformer|token_embedding|ln_final)\..*",
    r"(text\.)?(positional_embedding|text_projection|attn_mask)",
    r"logit_(scale|bias)",
)
NOTHING = (None, False, {})
REQUIRED = {  # supported values of the settings that change what the tower computes
    name: NOTHING
    for name in (
        "timm_model_name", "ls_init_value", "attentional_pool", "attn_pooler_queries", "input_patchnorm",
        "no_ln_pre", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn",
        "scale_fc", "act_kwargs", "norm_kwargs",
    )
}  # fmt: skip
REQUIRED["pos_embed_type"] = ("learnable",)
FITS = {"shortest": "crop", "squash": "squash"}


@dataclasses.dataclass(frozen=True)
class OpenClip(Family):
    """A directory of open_clip, or its file of weights."""

    known_by = f"{CONFIG} and {WEIGHTS[0]} or .bin"

    def knows(self, path):
        if path.is_file():
            return "visual.conv1.weight" in open_tensors(path)
        ours, theirs = (any((path / name).is_file() for name in names) for names in (WEIGHTS, HUGGING_FACE))
        # A repository may hold weights of both libraries. The settings of both may be there in either case.
        return (path / CONFIG).is_file() and ours and not theirs

    def tensors(self, path: Path):
        if path.is_file():
            return open_tensors(path)
        return open_tensors(next(path / name for name in WEIGHTS if (path / name).is_file()))

    def settings(self, path):
        where = (path.parent if path.is_file() else path) / CONFIG
        if not where.is_file():
            raise CheckpointError(
                f"{path}: weights of open_clip do not say their heads and activation. "
                f"Put {CONFIG} of the same model beside them."
            )
        settings = read_json(where)
        model, pictures = settings.get("model_cfg", {}), settings.get("preprocess_cfg", {})
        c = model.get("vision_cfg", {})
        require(c, REQUIRED, where)
        require(pictures, {"interpolation": ("bicubic",), "resize_mode": tuple(FITS)}, where)
        if missing := {"width", "layers", "patch_size"} - set(c):
            raise CheckpointError(f"{where}: vision_cfg has no {', '.join(sorted(missing))}")
        config = EncoderConfig(
            image_size=c.get("image_size", 224),
            patch=c["patch_size"],
            width=c["width"],
            layers=c["layers"],
            heads=c["width"] // c.get("head_width", 64),
            mlp=int(c["width"] * c.get("mlp_ratio", 4.0)),
            activation="quick_gelu" if model.get("quick_gelu") else "gelu",
            mean=tuple(pictures.get("mean", CLIP_MEAN)),
            std=tuple(pictures.get("std", CLIP_STD)),
        )
        config.validate()
        return config, FITS[pictures.get("resize_mode", "shortest")]


OPEN_CLIP = OpenClip(styles=lambda c: (NAMES,), ignored=IGNORED)
