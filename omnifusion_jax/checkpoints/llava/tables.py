"""What the tensors of a LLaVA are called: the projector's, and what stands before the names of its tower and its language model."""

import dataclasses
import re

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import clip
from omnifusion_jax.checkpoints.encoders.clip import CLIP
from omnifusion_jax.checkpoints.encoders.siglip import SIGLIP
from omnifusion_jax.checkpoints.mapping.transforms import MATRIX, SAME
from omnifusion_jax.config import AdapterConfig, EncoderConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError

TOWER, LANGUAGE, PROJECTOR, NEWLINE = (
    "vision_tower.",
    "language_model.",
    "multi_modal_projector.",
    "image_newline",
)

TOWERS = (CLIP, SIGLIP)  # families that the classes take and whose names are under TOWER below

FORMS = (  # names that transformers 5 has in memory, and has written without the tower's own prefix: as public files have them
    (r"lm_head\.", LANGUAGE + "lm_head."),
    (r"model\.language_model\.", LANGUAGE + "model."),
    (r"model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"vision_tower\.(?!vision_model\.)", TOWER + clip.PREFIX),
)

IGNORED = (*(re.escape(TOWER) + f"(?:{name})" for name in SIGLIP.ignored), *language_models.IGNORED)


def projector_table(c: AdapterConfig):
    first, second = PROJECTOR + "linear_1.", PROJECTOR + "linear_2."
    if c.kind == "linear":  # linear_2 is an identity there
        return {
            first + "weight": ("image/adapter/linear/kernel", MATRIX),
            first + "bias": ("image/adapter/linear/bias", SAME),
        }
    return {
        first + "weight": ("image/adapter/up/kernel", MATRIX),
        first + "bias": ("image/adapter/up/bias", SAME),
        second + "weight": ("image/adapter/linear/kernel", MATRIX),
        second + "bias": ("image/adapter/linear/bias", SAME),
    }


def obstacles(c: EncoderConfig):
    """Why each of TOWERS cannot be `c`, in their order; "" where it can."""
    alone = dataclasses.replace(
        c, shortest_edge=None
    )  # what comes before the tower is the processor's affair
    return [family.obstacles(alone) for family in TOWERS]


def tower_of(c: EncoderConfig):
    """The family that computes `c`, which there must be."""
    return TOWERS[obstacles(c).index("")]


def table(c: ModelConfig, tower):
    """Everything that such a checkpoint holds, under the names of public files; `tower` is one of TOWERS."""
    rows = {TOWER + name: row for name, row in tower.table(c.image.encoders[0]).items()}
    rows |= projector_table(c.image.adapter)
    rows |= {NEWLINE: ("special/newline", SAME)} if c.image.newline else {}
    return rows | {LANGUAGE + name: row for name, row in language_models.table(c.decoder).items()}


def public_names(tensors, where):
    """The tensors under the names of public files."""
    found = {}
    for name, a in tensors.items():
        public = name
        for pattern, prefix in FORMS:
            public = re.sub("^" + pattern, prefix, public)
        if public in found:
            raise CheckpointError(
                f"{where}: {name} stands there under another name too, {public}. Remove one of them"
            )
        found[public] = a
    return found
