"""Reads OmniLMM-12B, and MiniCPM-V 1.0 and 2.0."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.checkpoints.omnilmm.settings import model_config
from omnifusion_jax.checkpoints.omnilmm.systems import SYSTEMS, System, positions, table
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer, with_tokens
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.adapters.resampler import square


def is_omnilmm(directory: str | Path) -> bool:
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in SYSTEMS


def read(
    directory: str | Path, dtype=None, vision: Sequence[Path] = ()
) -> tuple[ModelConfig, dict[str, Lazy], Path]:
    """(ModelConfig, {path: Lazy}, tokenizer directory).

    Depths, queries and whether there is a head of its own follow from the tensors.

    Args:
      directory: of the checkpoint.
      dtype: type of the arrays; None keeps the stored types.
      vision: the tower as timm has it, a directory or a file, where a checkpoint lacks it.

    Raises:
      CheckpointError: a file is missing, a setting is not supported, files contradict each other, or tensors
        do not fit (all are listed).
    """
    directory = Path(directory)
    hf, tensors = read_json(directory / "config.json"), open_tensors(directory)
    system = SYSTEMS[hf["model_type"]]
    tensors = with_tower(tensors, hf, system, directory, vision)
    config = model_config(hf, tensors, directory / "config.json")
    check_positions(config, system, tensors, directory)
    tensors = {name: a for name, a in tensors.items() if name != positions(system)}
    tensors = language_models.without_copy(tensors, config.decoder, directory, system.language)
    ignored = (
        *language_models.IGNORED,
        *(system.vision.replace(".", r"\.") + p for p in system.tower.ignored),
    )
    arrays = from_foreign(
        tensors, table(config, system), shapes_of(config), directory, ignore=ignored, dtype=dtype
    )
    tokenizer = fast_tokenizer(directory)
    if tokenizer is None:
        raise CheckpointError(f"{directory}: neither tokenizer.json nor tokenizer.model is there")
    return config, arrays, with_tokens(tokenizer, system.tokens)


def with_tower(tensors: Mapping, hf: dict, system: System, where: Path, vision: Sequence[Path]) -> dict:
    """The tensors of a checkpoint by name, with those of its tower: its own, or else those in `vision`.

    Of timm's tower the last block is left out, which the systems do not run unless config.json says so.

    Raises:
      CheckpointError: there is no tower, there are several, or it is none of timm's of this kind and depth.
    """
    if any(name.startswith(system.vision) for name in tensors):
        if vision:
            raise CheckpointError(f"{where}: holds its vision tower, {system.vision}*; leave out --vision")
        return dict(tensors)
    if len(vision) != 1:
        raise CheckpointError(
            f"{where}: there is no tensor {system.vision}*: this checkpoint was saved without its vision "
            f"tower, {hf.get(system.tower_setting) or system.tower_name}, and {len(vision) or 'none'} given. "
            f"Pass one as vision (--vision): a directory or a file of timm's, or timm/{system.tower_name}"
        )
    [source] = vision
    tower = open_tensors(source) if source.is_file() or system.tower.knows(source) else {}
    block = {name: int(found[1]) for name in tower if (found := re.match(r"blocks\.(\d+)\.", name))}
    depth, there = system.blocks + (not hf.get("drop_vision_last_layer", True)), len(set(block.values()))
    if there < depth:
        raise CheckpointError(
            f"{source}: not the vision tower of {where}, which is timm's {system.tower_name} "
            f"({system.tower.known_by}; or its weights as one file): it has {there} blocks, {depth} are run"
        )
    used = {system.vision + name: a for name, a in tower.items() if block.get(name, 0) < depth}
    return dict(tensors) | used


def check_positions(c: ModelConfig, system: System, tensors, where: Path):
    """Raises CheckpointError unless the stored positions of the queries are those of their grid."""
    name = positions(system)
    if name not in tensors:
        raise CheckpointError(f"{where}: {name} is missing")
    stored, ours = tensors[name], square(c.image.side, c.decoder.width)
    same = stored.shape == ours.shape
    if same:
        off = np.abs(np.asarray(stored, np.float32) - ours).max()
        same = off <= 2 * float(jnp.finfo(stored.dtype).eps)
    if not same:
        raise CheckpointError(
            f"{where}: {name} holds other positions than the sines and cosines of a grid of "
            f"{c.image.side} x {c.image.side} queries, which are what this adapter has"
        )
