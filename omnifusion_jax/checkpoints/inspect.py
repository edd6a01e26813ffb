"""Describes a directory or a hub id: its format, settings and parts, and where each array comes from.

Reads names and settings, and values only where they decide what the model is.
"""

import collections
import dataclasses
from pathlib import Path

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import vision_towers
from omnifusion_jax.checkpoints.load import format_of, load_checkpoint, load_decoder, load_encoder
from omnifusion_jax.checkpoints.storage import hub
from omnifusion_jax.config import part_of
from omnifusion_jax.fields import nested


def inspect(source: str | Path, **options) -> tuple[str, dict, dict]:
    """(format, settings by name, {path: Lazy}) of a checkpoint, a vision tower or a language model.

    `options` are those of `load_checkpoint`.

    Raises:
      CheckpointError: the source is none of these, or its files contradict each other.
    """
    directory = hub.local(source, files=True)
    if format_of(directory) is None and directory.is_dir() and language_models.is_decoder(directory):
        config, arrays, _ = load_decoder(source)
        return config.family, {"decoder": config}, arrays
    if format_of(directory) is None and vision_towers.is_encoder(directory):
        config, arrays = load_encoder(source)
        families = vision_towers.VISION_FAMILIES.items()
        name = next(name for name, family in families if family.knows(directory))
        return name, {"encoder": config}, arrays
    found = load_checkpoint(source, **options)
    parts = {name: value for name, value in vars(found.config).items() if name != "filled_from"}
    return found.format, parts, found.arrays


def lines(format, settings, arrays):
    """Yields lines for people to read: the settings, the parts with their sizes, then one row per array."""
    yield f"{'format':16} {format}"
    for name, value in settings.items():
        if dataclasses.is_dataclass(value):
            for path, own in sections(name, value):
                fields = " ".join(f"{k}={v!r}" for k, v in own.items())
                yield f"{path:16} {fields}"
        elif value:
            yield f"{name:16} {value!r}"
    parts = collections.defaultdict(list)
    for path, a in arrays.items():
        parts[part_of(path)].append(a)
    yield ""
    for name, held in parts.items():
        types = ", ".join(sorted({str(a.dtype) for a in held}))
        count = sum(a.size for a in held)
        stored = sum(a.size * a.dtype.itemsize for a in held)
        yield f"{name:16} {count:>14,} parameters {stored:>15,} bytes  {types}"
    yield ""
    width = max(len(path) for path in arrays)
    for path, a in arrays.items():
        yield f"{path:{width}}  {a.dtype!s:8} {list(a.shape)!s:24} <- {a.origin}"


def sections(name, config):
    """Yields (path, own settings) of a config and of those inside: image, image.encoders.0, image.adapter."""
    held = {k: nested(v) for k, v in vars(config).items()}
    yield name, {k: v for k, v in vars(config).items() if not held[k]}
    for k, inside in held.items():
        for path, one in inside.items():
            yield from sections(f"{name}.{k}{path}", one)
