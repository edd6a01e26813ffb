"""InternViT as Hugging Face stores it (`InternVLVisionModel`), and as OpenGVLab does with its own code."""

from omnifusion_jax.checkpoints.encoders.base import QKV, named
from omnifusion_jax.checkpoints.encoders.hugging_face import BLOCK, HuggingFace
from omnifusion_jax.checkpoints.storage.settings import require
from omnifusion_jax.config import IMAGENET_MEAN, IMAGENET_STD

FIXED = {
    "patch_bias": True,
    "layer_scale": True,
    "pre_norm": False,
    "post_norm": False,
    # The last layer, as its authors use it: they left out the last three of the 48 layers that they trained.
    "feature_layer": -1,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
}
LAYER, ORIGINAL = "encoder.layer.{}.", "encoder.layers.{}."
ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.projection_layer")

NAMES = named(
    tensors={
        "embeddings.cls_token": "class_token",
        "embeddings.position_embeddings": "position",
        LAYER + "attention.q_norm.weight": "layers/attention/query_norm/scale",
        LAYER + "attention.k_norm.weight": "layers/attention/key_norm/scale",
        LAYER + "lambda_1": "layers/scale1",
        LAYER + "lambda_2": "layers/scale2",
    },
    linear={
        "embeddings.patch_embeddings.projection": "patch",
        **{LAYER + name: ours for name, ours in zip(ATTENTION, (*QKV, "layers/attention/out"), strict=True)},
        LAYER + "mlp.fc1": "layers/feed_forward/up",
        LAYER + "mlp.fc2": "layers/feed_forward/down",
    },
    norms={LAYER + "layernorm_before": "layers/norm1", LAYER + "layernorm_after": "layers/norm2"},
)
ORIGINAL_NAMES = named(
    tensors={
        "embeddings.class_embedding": "class_token",
        "embeddings.position_embedding": "position",
        ORIGINAL + "attn.q_norm.weight": "layers/attention/query_norm/scale",
        ORIGINAL + "attn.k_norm.weight": "layers/attention/key_norm/scale",
        ORIGINAL + "ls1": "layers/scale1",
        ORIGINAL + "ls2": "layers/scale2",
    },
    linear={
        "embeddings.patch_embedding": "patch",
        ORIGINAL + "attn.qkv": QKV,
        ORIGINAL + "attn.proj": "layers/attention/out",
        ORIGINAL + "mlp.fc1": "layers/feed_forward/up",
        ORIGINAL + "mlp.fc2": "layers/feed_forward/down",
    },
    norms={ORIGINAL + "norm1": "layers/norm1", ORIGINAL + "norm2": "layers/norm2"},
)


def same_eps(hf, where):
    """Sets no field, but refuses an epsilon other than that of the norms of queries and keys.

    Theirs is 1e-6 in transformers, and no setting says it. Our norms all have the same epsilon.
    """
    if hf.get("use_qk_norm"):
        require(hf, {"layer_norm_eps": (1e-6,)}, where)
    return {}


INTERNVL_VISION = HuggingFace(
    styles=lambda c: (NAMES,),
    ignored=(r"embeddings\.mask_token",),
    batched=True,
    model_types=("internvl_vision",),
    architecture="InternVLVisionModel",
    fixed=FIXED,
    fields={
        **BLOCK,
        "hidden_size": ("width", 1024),
        "num_hidden_layers": ("layers", 24),
        "num_attention_heads": ("heads", 16),
        "intermediate_size": ("mlp", 4096),
        "image_size": ("image_size", 448),
        "patch_size": ("patch", 14),
        "norm_type": ("norm", "layer_norm"),
        "attention_bias": ("qkv_bias", False),
        "use_qk_norm": ("qk_norm", False),
    },
    required={"use_absolute_position_embeddings": (True,), "use_mean_pooling": (True,)},
    more=same_eps,
    resizes=True,
)
INTERNVIT = HuggingFace(
    styles=lambda c: (ORIGINAL_NAMES,),
    batched=True,
    model_types=("intern_vit_6b",),
    architecture="InternVisionModel",
    fixed=FIXED,
    fields={
        **BLOCK,
        "hidden_size": ("width", 3200),
        "num_hidden_layers": ("layers", 48),
        "num_attention_heads": ("heads", 25),
        "intermediate_size": ("mlp", 12800),
        "image_size": ("image_size", 224),
        "patch_size": ("patch", 14),
        "norm_type": ("norm", "rms_norm"),
        "qkv_bias": ("qkv_bias", False),
        "qk_normalization": ("qk_norm", True),
    },
    required={"use_moe": (False,)},
    resizes=True,
)
