"""CLIP as Hugging Face stores it: `CLIPModel` and `CLIPVisionModel`."""

from omnifusion_jax.checkpoints.encoders import hugging_face
from omnifusion_jax.checkpoints.encoders.base import named

PREFIX = "vision_model."  # public files have it, and transformers 5 drops it in memory
LAYER = PREFIX + "encoder.layers.{}."
NAMES = named(
    tensors={
        PREFIX + "embeddings.class_embedding": "class_token",
        PREFIX + "embeddings.position_embedding.weight": "position",
    },
    linear={
        PREFIX + "embeddings.patch_embedding": "patch",
        LAYER + "self_attn.q_proj": "layers/attention/query",
        LAYER + "self_attn.k_proj": "layers/attention/key",
        LAYER + "self_attn.v_proj": "layers/attention/value",
        LAYER + "self_attn.out_proj": "layers/attention/out",
        LAYER + "mlp.fc1": "layers/feed_forward/up",
        LAYER + "mlp.fc2": "layers/feed_forward/down",
    },
    norms={
        PREFIX + "pre_layrnorm": "pre_norm",
        PREFIX + "post_layernorm": "post_norm",
        LAYER + "layer_norm1": "layers/norm1",
        LAYER + "layer_norm2": "layers/norm2",
    },
)
IGNORED = (
    r"(vision_model\.)?embeddings\.position_ids",
    r"text_model\..*",
    r"(text|visual)_projection\.weight",
    r"logit_scale",
)

CLIP = hugging_face.HuggingFace(
    styles=lambda c: (NAMES,),
    ignored=IGNORED,
    prefix=PREFIX,
    model_types=("clip", "clip_vision_model"),
    architecture="CLIPVisionModel",
    fields={
        **hugging_face.BLOCK,
        "intermediate_size": ("mlp", 3072),
        "image_size": ("image_size", 224),
        "patch_size": ("patch", 32),
        "hidden_act": ("activation", "quick_gelu"),
        "layer_norm_eps": ("eps", 1e-5),
    },
)
