"""Reads what phase 1 of the original code writes: a file with the adapter and one with the special vectors.

These files say only their own sizes. Everything else, above all the encoder and the decoder, is taken from a
model: the one that is to be trained further, or a preset.
"""

import copy
import dataclasses
from pathlib import Path

from omnifusion_jax.checkpoints.omnifusion.original import (
    ADAPTER,
    DECODER,
    RELEASES,
    SPECIAL,
    SUFFIXES,
    AdapterFile,
    find,
    read_joint,
)
from omnifusion_jax.checkpoints.omnifusion.settings import SETTINGS
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import PRESETS
from omnifusion_jax.models.presets import preset as make_preset


def is_phase1(directory: Path) -> bool:
    def there(name):
        return any((directory / f"{name}{suffix}").is_file() for suffix in SUFFIXES)

    whole = any((directory / folder).is_dir() for folder in RELEASES)
    return there(ADAPTER) and there(SPECIAL) and not whole


def model_of(directory: Path, name: str | None = None) -> ModelConfig:
    """The model of the preset `name`; None takes the one in omnifusion.json, or the published model.

    Its layout is the original's, unless omnifusion.json, which is read later, says otherwise.
    """
    file = directory / SETTINGS
    written = read_json(file).get("preset") if file.is_file() else None
    published = RELEASES[DECODER][1][AdapterFile(directory).towers - 1]
    name = name or (written if written in PRESETS else published)
    return dataclasses.replace(make_preset(name), layout="original")


def read(
    directory: Path, dtype=None, preset: str | None = None, assign: str | Path | None = None
) -> tuple[ModelConfig, dict[str, Lazy], None]:
    """(ModelConfig, {path: Lazy}, None): the files have no tokenizer.

    `preset` names the model that the files were made for; None as for `model_of`.

    Raises:
      CheckpointError: as for `read_for`.
    """
    advice = f"Say which model they were trained for: --preset=NAME (preset), one of {', '.join(PRESETS)}"
    return *read_for(model_of(directory, preset), directory, advice, dtype, assign), None


def read_for(
    model: ModelConfig, directory: Path, advice: str, dtype=None, assign: str | Path | None = None
) -> tuple[ModelConfig, dict[str, Lazy]]:
    """(`model` with the settings that the files say, {path: Lazy} of the adapter and the special vectors).

    The layout is the original's, the only one that the original code knows, unless omnifusion.json says
    otherwise. `advice` ends the message of the error that lists differences.

    Raises:
      CheckpointError: the files are unsafe, incomplete, or of another model; all differences are listed.
    """
    adapter = AdapterFile(directory)
    config = dataclasses.replace(copy.deepcopy(model), layout="original")
    ours, theirs = sizes_of(model), sizes(adapter)
    differing = [
        f"{name} is {size} there, {ours[name]} here" for name, size in theirs.items() if ours[name] != size
    ]
    if differing:
        raise CheckpointError(
            f"{directory} is not of the model {model.preset}: {'; '.join(differing)}. {advice}"
        )
    return config, read_joint(adapter, config, f"the encoder of the model {model.preset}", dtype, assign)


def sizes(adapter: AdapterFile) -> dict:
    """What the files say about the model that they belong to, by the names of `sizes_of`."""
    special = open_tensors(find(adapter.file.parent, SPECIAL))
    found = {
        "adapter.kind": "transformer" if adapter.towers == 1 else "sum",
        "special vectors": listed(special),
    }
    linear = adapter.tensors.get("linear.weight")
    if adapter.towers == 1 and linear is not None and linear.ndim == 2:
        found |= {"decoder.width": linear.shape[0], "encoder.width": linear.shape[1]}
    return found


def sizes_of(c: ModelConfig) -> dict:
    """What must agree between a model and the files of phase 1, by name."""
    widths = {"decoder.width": c.decoder.width, "encoder.width": c.image.encoders[0].width}
    return {"adapter.kind": c.image.adapter.kind, "special vectors": listed(c.special), **widths}


def listed(names):
    return ", ".join(sorted(name.lower() for name in names))
