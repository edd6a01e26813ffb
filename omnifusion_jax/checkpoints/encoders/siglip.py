"""SigLIP as Hugging Face stores it: `SiglipModel` and `SiglipVisionModel`.

timm.py has timm's SigLIP, which computes something else with the same weights.
"""

from omnifusion_jax.checkpoints.encoders import clip, hugging_face
from omnifusion_jax.config import HALF

SIGLIP = hugging_face.HuggingFace(
    styles=lambda c: (clip.NAMES,),
    ignored=(*clip.IGNORED, r"(vision_model\.)?head\..*", r"logit_bias"),
    prefix=clip.PREFIX,
    model_types=("siglip", "siglip_vision_model"),
    architecture="SiglipVisionModel",
    fixed={"class_token": False, "patch_bias": True, "pre_norm": False, "mean": HALF, "std": HALF},
    fields={
        **hugging_face.BLOCK,
        "intermediate_size": ("mlp", 3072),
        "image_size": ("image_size", 224),
        "patch_size": ("patch", 16),
        "hidden_act": ("activation", "gelu_pytorch_tanh"),
    },
    more_json=lambda c: {"vision_use_head": False},
    fit="squash",
)
