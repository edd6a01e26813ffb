"""What a directory or a hub id is, in lines: its format, its settings, its parts, and where each array comes from. Reads names and settings only."""

import collections
import dataclasses

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import vision_towers
from omnifusion_jax.checkpoints.load import format_of, load_checkpoint, load_decoder, load_encoder
from omnifusion_jax.checkpoints.storage import hub
from omnifusion_jax.config import part_of
from omnifusion_jax.fields import nested


def inspect(source, **options):
    """(format, settings by name, {path: Lazy}) of a checkpoint, a vision tower or a language model. `options` are those of `load_checkpoint`.

    Raises:
      CheckpointError: it is none of them, or does not fit together.
    """
    directory = hub.local(source, files=True)
    if format_of(directory) is None and directory.is_dir() and language_models.is_decoder(directory):
        config, arrays, _ = load_decoder(source)
        return config.family, {"decoder": config}, arrays
    if format_of(directory) is None and vision_towers.is_encoder(directory):
        config, arrays = load_encoder(source)
        return (
            next(name for name, family in vision_towers.VISION_FAMILIES.items() if family.knows(directory)),
            {"encoder": config},
            arrays,
        )
    found = load_checkpoint(source, **options)
    parts = {name: value for name, value in vars(found.config).items() if name != "filled_from"}
    return found.format, parts, found.arrays


def lines(format, settings, arrays):
    """For people: settings, then parts with their sizes, then a row an array."""
    yield f"{'format':16} {format}"
    for name, value in settings.items():
        if dataclasses.is_dataclass(value):
            yield from (
                f"{path:16} {' '.join(f'{k}={v!r}' for k, v in plain.items())}"
                for path, plain in sections(name, value)
            )
        elif value:
            yield f"{name:16} {value!r}"
    parts = collections.defaultdict(list)
    for path, a in arrays.items():
        parts[part_of(path)].append(a)
    yield ""
    for name, held in parts.items():
        types = ", ".join(sorted({str(a.dtype) for a in held}))
        yield f"{name:16} {sum(a.size for a in held):>14,} parameters {sum(a.size * a.dtype.itemsize for a in held):>15,} bytes  {types}"
    yield ""
    width = max(len(path) for path in arrays)
    for path, a in arrays.items():
        yield f"{path:{width}}  {a.dtype!s:8} {list(a.shape)!s:24} <- {a.origin}"


def sections(name, config):
    """(path, its own settings) of a config and of those in it: image, image.encoders.0, image.adapter."""
    held = {k: nested(v) for k, v in vars(config).items()}
    yield name, {k: v for k, v in vars(config).items() if not held[k]}
    for k, inside in held.items():
        for path, one in inside.items():
            yield from sections(f"{name}.{k}{path}", one)
