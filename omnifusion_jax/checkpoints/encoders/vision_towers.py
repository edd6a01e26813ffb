"""Vision towers of every known family: found, read, and written as Hugging Face has them."""

from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.encoders.clip import CLIP
from omnifusion_jax.checkpoints.encoders.dinov2 import DINOV2, DINOV2_HUB, DINOV2_WITH_REGISTERS
from omnifusion_jax.checkpoints.encoders.hugging_face import preprocessor_json
from omnifusion_jax.checkpoints.encoders.internvit import INTERNVIT, INTERNVL_VISION
from omnifusion_jax.checkpoints.encoders.open_clip import OPEN_CLIP
from omnifusion_jax.checkpoints.encoders.siglip import SIGLIP
from omnifusion_jax.checkpoints.encoders.timm import TIMM_SIGLIP
from omnifusion_jax.checkpoints.mapping.tensors import to_foreign
from omnifusion_jax.checkpoints.storage.settings import write_json
from omnifusion_jax.checkpoints.storage.weights import write_weights
from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.errors import CheckpointError

VISION_FAMILIES = {  # the first that knows a directory reads it
    "open_clip": OPEN_CLIP,
    "clip": CLIP,
    "siglip": SIGLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
    "internvl_vision": INTERNVL_VISION,
    "intern_vit_6b": INTERNVIT,
    "timm_siglip": TIMM_SIGLIP,
    "dinov2_hub": DINOV2_HUB,
}
WRITTEN = ("clip", "siglip", "dinov2", "dinov2_with_registers", "internvl_vision")


def is_encoder(path: Path):
    return any(family.knows(path) for family in VISION_FAMILIES.values())


def family_of(path: Path):
    """The family of a directory or a file. Raises CheckpointError for what is no vision model."""
    for family in VISION_FAMILIES.values():
        if family.knows(path):
            return family
    known = "; ".join(f"{name}: {family.known_by}" for name, family in VISION_FAMILIES.items())
    raise CheckpointError(f"{path}: no vision model of a known family ({known})")


def read_encoder(path: Path, dtype=None, ours="image/encoders/0"):
    """(EncoderConfig, {path: Lazy}) of a directory or a file.

    Raises:
      CheckpointError: it is no vision model, a setting is not supported, or tensors do not fit (all are listed).
    """
    return family_of(path).read(path, dtype, ours)


def preferred_fit(path: Path):
    """How the encoder of a directory or a file expects pictures to come to a square: a value of ImageConfig.fit. Raises CheckpointError."""
    return family_of(path).settings(path)[1]


def written_as(c: EncoderConfig):
    """The name of the family of Hugging Face that computes what `c` says. Raises CheckpointError with what each lacks where none does."""
    obstacles = {}
    for name in WRITTEN:
        obstacles[name] = VISION_FAMILIES[name].obstacles(c)
        if not obstacles[name]:
            return name
    reasons = "\n  ".join(f"{name}: {why}" for name, why in obstacles.items())
    raise CheckpointError(f"no vision model of Hugging Face computes what this encoder does:\n  {reasons}")


def write_encoder(directory, c: EncoderConfig, arrays, fit="crop", path="image/encoders/0"):
    """config.json, preprocessor_config.json and weights into `directory`.

    Args:
      c: the encoder.
      arrays: its parameters, by path (`path` and below).
      fit: how pictures come to a square (ImageConfig.fit); the file says "squash", or "crop" for every other.

    Raises:
      CheckpointError: no family of Hugging Face computes what `c` says.
    """
    family = VISION_FAMILIES[written_as(c)]
    tensors = to_foreign(arrays, family.table(c, path))
    dtype = next(iter(tensors.values())).dtype
    blank = {
        name: np.zeros(shape(c), dtype) for name, shape in family.blank.items()
    }  # the library wants them, and never uses them
    write_json(Path(directory) / "config.json", family.encoder_json(c, str(dtype)))
    write_json(Path(directory) / "preprocessor_config.json", preprocessor_json(c, fit))
    write_weights(directory, tensors | blank)
