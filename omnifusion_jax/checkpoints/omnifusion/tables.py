"""Names of the tensors of the one-encoder adapter and of the special vectors in the published files."""

from omnifusion_jax.checkpoints.mapping.transforms import MATRIX, SAME, Fused, split, split_in, split_out
from omnifusion_jax.config import ModelConfig

LAYER = "transformer_layer."  # names of the one-encoder adapter's tensors begin with it


def adapter_table(c: ModelConfig) -> dict:
    """The conversion table of the state dict of `VisualToGPTMapping`.

    It is one `torch.nn.TransformerEncoderLayer`, whose queries, keys and values come from one matrix, and a
    `Linear`.
    """
    heads = c.image.adapter.heads, c.image.encoders[0].width // c.image.adapter.heads
    layer = LAYER
    return {
        layer + "self_attn.in_proj_weight": packed("kernel", split_out(*heads)),
        layer + "self_attn.in_proj_bias": packed("bias", split(*heads)),
        layer + "self_attn.out_proj.weight": ("image/adapter/layer/attention/out/kernel", split_in(*heads)),
        layer + "self_attn.out_proj.bias": ("image/adapter/layer/attention/out/bias", SAME),
        layer + "linear1.weight": ("image/adapter/layer/feed_forward/up/kernel", MATRIX),
        layer + "linear1.bias": ("image/adapter/layer/feed_forward/up/bias", SAME),
        layer + "linear2.weight": ("image/adapter/layer/feed_forward/down/kernel", MATRIX),
        layer + "linear2.bias": ("image/adapter/layer/feed_forward/down/bias", SAME),
        layer + "norm1.weight": ("image/adapter/layer/norm1/scale", SAME),
        layer + "norm1.bias": ("image/adapter/layer/norm1/bias", SAME),
        layer + "norm2.weight": ("image/adapter/layer/norm2/scale", SAME),
        layer + "norm2.bias": ("image/adapter/layer/norm2/bias", SAME),
        "linear.weight": ("image/adapter/linear/kernel", MATRIX),
        "linear.bias": ("image/adapter/linear/bias", SAME),
    }


def packed(name: str, transform) -> Fused:
    """The one tensor in which PyTorch keeps queries, keys and values."""
    parts = ("query", "key", "value")
    return Fused(*((f"image/adapter/layer/attention/{part}/{name}", transform) for part in parts))


SPECIAL_TABLE = {name: (f"special/{name.lower()}", SAME) for name in ("USER", "BOT", "SOI", "EOI")}
