"""Names of a LLaVA's tensors.

The projector's are listed here. Those of the vision tower and of the language model have the names that they
have in checkpoints of their own, with a prefix.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import clip
from omnifusion_jax.checkpoints.encoders.clip import CLIP
from omnifusion_jax.checkpoints.encoders.hugging_face import HuggingFace
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

TOWERS = (CLIP, SIGLIP)  # families of vision towers that transformers' LLaVA classes take

# transformers 5 has other names in memory, and has written files with them; the vision tower's own prefix is
# missing there. (Pattern of the beginning of such a name, what public files have in its place)
FORMS = (
    (r"lm_head\.", LANGUAGE + "lm_head."),
    (r"model\.language_model\.", LANGUAGE + "model."),
    (r"model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"vision_tower\.(?!vision_model\.)", TOWER + clip.PREFIX),
)

IGNORED = (*(re.escape(TOWER) + f"(?:{name})" for name in SIGLIP.ignored), *language_models.IGNORED)


def projector_table(c: AdapterConfig) -> dict:
    """The conversion table of the projector, see checkpoints/mapping/tensors.py."""
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


def obstacles(c: EncoderConfig) -> list[str]:
    """For each of TOWERS, why it cannot compute `c`; "" if it can."""
    alone = dataclasses.replace(c, shortest_edge=None)  # the processor does this, not the tower
    return [family.obstacles(alone) for family in TOWERS]


def tower_of(c: EncoderConfig) -> HuggingFace:
    """The first of TOWERS that computes `c`. There must be one."""
    return TOWERS[obstacles(c).index("")]


def table(c: ModelConfig, tower: HuggingFace) -> dict:
    """The conversion table of a whole checkpoint with the names of public files; `tower` is one of TOWERS."""
    rows = {TOWER + name: row for name, row in tower.table(c.image.encoders[0]).items()}
    rows |= projector_table(c.image.adapter)
    rows |= {NEWLINE: ("special/newline", SAME)} if c.image.newline else {}
    return rows | {LANGUAGE + name: row for name, row in language_models.table(c.decoder).items()}


def public_names(tensors: Mapping[str, np.ndarray], where) -> dict[str, np.ndarray]:
    """The tensors under the names of public files.

    Raises:
      CheckpointError: two tensors come to the same name.
    """
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
