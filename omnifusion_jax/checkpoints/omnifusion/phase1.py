"""What phase 1 of the original code writes: the adapter's file and the special vectors', alone.

They say their own sizes. All else, the encoder and the decoder before all, is that of a model: of the one
that training goes on with, or of a preset.
"""

import copy
import dataclasses
from pathlib import Path

from omnifusion_jax.checkpoints.omnifusion.original import (
    ADAPTER,
    DECODER,
    RELEASES,
    SPECIAL,
    AdapterFile,
    find,
    read_joint,
)
from omnifusion_jax.checkpoints.omnifusion.settings import SETTINGS
from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import PRESETS
from omnifusion_jax.models.presets import preset as make_preset

SUFFIXES = (".safetensors", ".pt")


def is_phase1(directory: Path):
    files = all(
        any((directory / f"{name}{suffix}").is_file() for suffix in SUFFIXES) for name in (ADAPTER, SPECIAL)
    )
    return files and not any((directory / folder).is_dir() for folder in RELEASES)


def model_of(directory, name=None) -> ModelConfig:
    """The model of the preset `name`; None: of the one in omnifusion.json, or the published model.

    Its layout is the original's, unless omnifusion.json says otherwise when it is read.
    """
    file = directory / SETTINGS
    written = read_json(file).get("preset") if file.is_file() else None
    published = RELEASES[DECODER][1][AdapterFile(directory).towers - 1]
    return dataclasses.replace(
        make_preset(name or (written if written in PRESETS else published)), layout="original"
    )


def read(directory, dtype=None, preset=None, assign=None):
    """(ModelConfig, {path: Lazy}, None). `preset` names the model that the files were made for; None: the published one."""
    advice = f"Say which model they were trained for: --preset=NAME (preset), one of {', '.join(PRESETS)}"
    return *read_for(model_of(directory, preset), directory, advice, dtype, assign), None


def read_for(model: ModelConfig, directory, advice, dtype=None, assign=None):
    """(`model` with the settings that the files say, {path: Lazy} of the adapter and the special vectors).

    The layout is the original's, which alone its code knows, unless omnifusion.json says otherwise.

    Raises:
      CheckpointError: the files are unsafe, incomplete, or of another model; what differs is listed.
    """
    adapter, config = AdapterFile(directory), dataclasses.replace(copy.deepcopy(model), layout="original")
    ours = sizes_of(model)
    differing = [
        f"{name} is {size} there, {ours[name]} here"
        for name, size in sizes(adapter).items()
        if ours[name] != size
    ]
    if differing:
        raise CheckpointError(
            f"{directory} is not of the model {model.preset}: {'; '.join(differing)}. {advice}"
        )
    return config, read_joint(adapter, config, f"the encoder of the model {model.preset}", dtype, assign)


def sizes(adapter: AdapterFile):
    """What the files say of the model they are of, by the names of `sizes_of`."""
    special = open_tensors(find(adapter.file.parent, SPECIAL))
    found = {
        "adapter.kind": "transformer" if adapter.towers == 1 else "sum",
        "special vectors": listed(special),
    }
    linear = adapter.tensors.get("linear.weight")
    if adapter.towers == 1 and linear is not None and linear.ndim == 2:
        found |= {"decoder.width": linear.shape[0], "encoder.width": linear.shape[1]}
    return found


def sizes_of(c: ModelConfig):
    widths = {"decoder.width": c.decoder.width, "encoder.width": c.image.encoders[0].width}
    return {"adapter.kind": c.image.adapter.kind, "special vectors": listed(c.special), **widths}


def listed(names):
    return ", ".join(sorted(name.lower() for name in names))
