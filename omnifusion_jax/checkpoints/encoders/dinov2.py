"""DINOv2 with and without registers, as Hugging Face stores it and as its authors do.

The original files hold tensors and no settings.
"""

import dataclasses

from omnifusion_jax.checkpoints.encoders import timm
from omnifusion_jax.checkpoints.encoders.base import QKV, Family, named
from omnifusion_jax.checkpoints.encoders.hugging_face import BLOCK, HuggingFace
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import IMAGENET_MEAN, IMAGENET_STD, EncoderConfig

FIXED = {
    "patch_bias": True,
    "layer_scale": True,
    "pre_norm": False,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
}
FIELDS = {**BLOCK, "image_size": ("image_size", 224), "qkv_bias": ("qkv_bias", True)}
LAYER = "encoder.layer.{}."

# Names of the attention and of the gated feed-forward block: in public files, and since transformers 5.
PUBLIC = ("attention.query", "attention.key", "attention.value", "output.dense")
PUBLIC_GATED = {
    "weights_in": ("layers/feed_forward/gate", "layers/feed_forward/up"),
    "weights_out": "layers/feed_forward/down",
}
LATER = ("q_proj", "k_proj", "v_proj", "o_proj")
LATER_GATED = {
    "gate_proj": "layers/feed_forward/gate",
    "up_proj": "layers/feed_forward/up",
    "down_proj": "layers/feed_forward/down",
}


def names(attention, feed_forward):
    """The names of all tensors, with those of the attention's layers and the feed-forward's as given."""
    attention = dict(zip(attention, (*QKV, "layers/attention/out"), strict=True))
    return named(
        tensors={
            "embeddings.cls_token": "class_token",
            "embeddings.register_tokens": "registers",
            "embeddings.position_embeddings": "position",
            LAYER + "layer_scale1.lambda1": "layers/scale1",
            LAYER + "layer_scale2.lambda1": "layers/scale2",
        },
        linear={
            "embeddings.patch_embeddings.projection": "patch",
            **{f"{LAYER}attention.{name}": ours for name, ours in attention.items()},
            **{f"{LAYER}mlp.{name}": ours for name, ours in feed_forward.items()},
        },
        norms={LAYER + "norm1": "layers/norm1", LAYER + "norm2": "layers/norm2", "layernorm": "post_norm"},
    )


def styles(c: EncoderConfig):
    if c.activation == "swiglu":
        return names(PUBLIC, PUBLIC_GATED), names(LATER, LATER_GATED)
    return names(PUBLIC, timm.MLP), names(LATER, timm.MLP)


def feed_forward(hf, where):
    """The fields of EncoderConfig that describe the feed-forward block.

    A gated block has two thirds of the hidden width, rounded up to a multiple of 8.
    """
    hidden = int(hf.get("hidden_size", 768) * hf.get("mlp_ratio", 4))
    if hf.get("use_swiglu_ffn"):
        return {"mlp": (int(hidden * 2 / 3) + 7) // 8 * 8, "activation": "swiglu"}
    return {"mlp": hidden}


def feed_forward_json(c: EncoderConfig):
    """The settings of config.json from which `feed_forward` reads the same fields."""
    if c.activation != "swiglu":
        return {"mlp_ratio": round(c.mlp / c.width)}
    return {"mlp_ratio": round(c.mlp / c.width * 3 / 2), "use_swiglu_ffn": True, "hidden_act": "gelu"}


COMMON = {
    "styles": styles,
    "ignored": (r"(dinov2\w*\.)?embeddings\.mask_token", r"classifier\..*"),
    "batched": True,
    "more": feed_forward,
    "more_json": feed_forward_json,
    "blank": {"embeddings.mask_token": lambda c: (1, c.width)},
    "resizes": True,
}
DINOV2 = HuggingFace(
    **COMMON,
    prefix="dinov2.",
    model_types=("dinov2",),
    architecture="Dinov2Model",
    fixed=FIXED,
    fields={**FIELDS, "patch_size": ("patch", 14)},
)
DINOV2_WITH_REGISTERS = HuggingFace(
    **COMMON,
    prefix="dinov2_with_registers.",
    model_types=("dinov2_with_registers",),
    architecture="Dinov2WithRegistersModel",
    fixed={**FIXED, "position_resize": "bicubic_antialias"},
    fields={**FIELDS, "patch_size": ("patch", 16), "num_register_tokens": ("registers", 4)},
)

HEAD_DIM = 64  # in every published size


@dataclasses.dataclass(frozen=True)
class Hub(Family):
    """A file of the original code.

    Sizes come from the shapes of tensors. Pictures are 224 pixels wide, as in that code's evaluation.
    """

    known_by = "one file with the names of the original DINOv2"

    def knows(self, path):
        return path.is_file() and "blocks.0.ls1.gamma" in open_tensors(path)

    def settings(self, path):
        tensors = self.tensors(path)
        size = timm.sizes(tensors, path)
        registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
        config = EncoderConfig(
            **size,
            **FIXED,
            image_size=224,
            shortest_edge=256,
            heads=size["width"] // HEAD_DIM,
            activation="swiglu" if "blocks.0.mlp.w12.weight" in tensors else "gelu",
            eps=1e-6,
            registers=registers,
            position_resize="bicubic_antialias" if registers else "bicubic_offset",
        )
        config.validate()
        return config.canonical(), "crop"


DINOV2_HUB = Hub(styles=lambda c: (timm.names(c),), ignored=("mask_token",), batched=True)
