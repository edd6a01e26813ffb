"""Vision towers of every known family: found, read, and written in the format of Hugging Face."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.encoders.base import EncoderFamily, Family
from omnifusion_jax.checkpoints.encoders.clip import CLIP
from omnifusion_jax.checkpoints.encoders.dinov2 import DINOV2, DINOV2_HUB, DINOV2_WITH_REGISTERS
from omnifusion_jax.checkpoints.encoders.hugging_face import preprocessor_json
from omnifusion_jax.checkpoints.encoders.internvit import INTERNVIT, INTERNVL_VISION
from omnifusion_jax.checkpoints.encoders.open_clip import OPEN_CLIP
from omnifusion_jax.checkpoints.encoders.siglip import SIGLIP
from omnifusion_jax.checkpoints.encoders.timm import TIMM_EVA02, TIMM_SIGLIP
from omnifusion_jax.checkpoints.mapping.tensors import to_foreign
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.settings import write_json
from omnifusion_jax.checkpoints.storage.weights import write_weights
from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.errors import CheckpointError

VISION_FAMILIES: dict[str, EncoderFamily] = {  # the first family that knows a directory reads it
    "open_clip": OPEN_CLIP,
    "clip": CLIP,
    "siglip": SIGLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_WITH_REGISTERS,
    "internvl_vision": INTERNVL_VISION,
    "intern_vit_6b": INTERNVIT,
    "timm_siglip": TIMM_SIGLIP,
    "timm_eva02": TIMM_EVA02,
    "dinov2_hub": DINOV2_HUB,
}
WRITTEN = ("clip", "siglip", "dinov2", "dinov2_with_registers", "internvl_vision")


def is_encoder(path: Path) -> bool:
    return any(family.knows(path) for family in VISION_FAMILIES.values())


def family_of(path: Path) -> Family:
    """The family of a directory or a file.

    Raises:
      CheckpointError: it is not a vision model of a known family.
    """
    for family in VISION_FAMILIES.values():
        if family.knows(path):
            return family
    known = "; ".join(f"{name}: {family.known_by}" for name, family in VISION_FAMILIES.items())
    raise CheckpointError(f"{path}: no vision model of a known family ({known})")


def read_encoder(
    path: Path, dtype=None, ours: str = "image/encoders/0"
) -> tuple[EncoderConfig, dict[str, Lazy]]:
    """The config and the arrays of the encoder in a directory or a file.

    Args:
      path: the directory or the file.
      dtype: of the arrays; None keeps that of the files.
      ours: the path of the encoder in our model, under which the paths of the arrays lie.

    Raises:
      CheckpointError: it is not a vision model, a setting is not supported, or tensors do not fit
        (all are listed).
    """
    return family_of(path).read(path, dtype, ours)


def preferred_fit(path: Path) -> str:
    """How the encoder in a directory or a file expects pictures to be fitted to a square (ImageConfig.fit).

    Raises:
      CheckpointError: it is not a vision model, or a setting is not supported.
    """
    return family_of(path).settings(path)[1]


def written_as(c: EncoderConfig) -> str:
    """The name of the family of Hugging Face that computes what `c` says.

    Raises:
      CheckpointError: no family does; lists what each of them lacks.
    """
    obstacles = {}
    for name in WRITTEN:
        obstacles[name] = VISION_FAMILIES[name].obstacles(c)
        if not obstacles[name]:
            return name
    reasons = "\n  ".join(f"{name}: {why}" for name, why in obstacles.items())
    raise CheckpointError(f"no vision model of Hugging Face computes what this encoder does:\n  {reasons}")


def write_encoder(
    directory: str | Path,
    c: EncoderConfig,
    arrays: Mapping[str, np.ndarray],
    fit: str = "crop",
    path: str = "image/encoders/0",
):
    """Writes config.json, preprocessor_config.json and weights into `directory`.

    Args:
      directory: an existing one.
      c: the encoder.
      arrays: its parameters by path, all of them under `path`.
      fit: how pictures are fitted to a square (ImageConfig.fit). preprocessor_config.json knows only "squash"
        and "crop"; every other value is written as "crop".
      path: of the encoder in our model.

    Raises:
      CheckpointError: no family of Hugging Face computes what `c` says.
    """
    family = VISION_FAMILIES[written_as(c)]
    tensors = to_foreign(arrays, family.table(c, path))
    dtype = next(iter(tensors.values())).dtype
    # The library wants these tensors, and never uses them.
    blank = {name: np.zeros(shape(c), dtype) for name, shape in family.blank.items()}
    write_json(Path(directory) / "config.json", family.encoder_json(c, str(dtype)))
    write_json(Path(directory) / "preprocessor_config.json", preprocessor_json(c, fit))
    write_weights(directory, tensors | blank)
