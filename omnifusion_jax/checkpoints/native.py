"""The library's own checkpoint directory.

    arrays/        Orbax, a plain nested dict by path, no framework types
    config.json    {"version": 1, "parts": ["image/adapter", "special"], "model": {...}, "lora": {...},
                    "weights": "int8"}
    tokenizer.json, tokenizer_config.json, ...    the tokenizer's files, where there is one

In config.json, `model` is the ModelConfig of the whole model, and `parts` lists which of its parts are there:
checkpoints of phase 1 hold only what was trained. With LoRA that is the part "lora", the factors beside the
decoder's kernels, and `lora` is their LoraConfig. `weights` is there if kernels are integers: each has its
scales beside it, as nn/quantized.py describes them.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from omnifusion_jax.checkpoints import integers
from omnifusion_jax.checkpoints.mapping.shapes import NONE, shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import refuse
from omnifusion_jax.checkpoints.storage import chunks
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.settings import read_json, require, write_json
from omnifusion_jax.checkpoints.storage.staging import check_free, unfinished, written_beside
from omnifusion_jax.checkpoints.tokenizers import copy_tokenizer, fast_tokenizer
from omnifusion_jax.config import LoraConfig, ModelConfig, from_dict, part_of
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.nested import flat, nested
from omnifusion_jax.paths import located

VERSION = 1


def save_native(
    directory: str | Path,
    config: ModelConfig,
    arrays: Mapping,
    tokenizer_dir: str | Path | None = None,
    factors: LoraConfig = NONE,
):
    """Writes whole parts of a model. The directory gets its name only once it is complete; in a store (gs://...)
    config.json comes last.

    `arrays` maps paths to Lazy, numpy or jax arrays. `factors` says which of them are beside kernels, if any
    are. Every process of a job calls this, with global arrays.

    Raises:
      CheckpointError: the directory exists and is not empty, the disk is full, or the arrays are not whole
        parts of the model that `config` describes.
    """
    parts = sorted(set(map(part_of, arrays)))
    check(arrays, config, parts, directory, factors)
    directory = located(directory)
    check_free(directory)  # in every process: if only one stopped here, the others would wait for it forever
    first = jax.process_index() == 0  # this process alone makes and names the directory
    # The free space is checked only in a job of one process, for the same reason: the first would stop alone
    size = sum(a.nbytes for a in arrays.values()) if jax.process_count() == 1 else 0
    staged = written_beside(directory, size) if first else contextlib.nullcontext(unfinished(directory))
    with staged as partial:
        multihost_utils.sync_global_devices(f"{directory} begun")
        write(partial / "arrays", arrays)
        if first:
            if tokenizer_dir is not None:
                copy_tokenizer(tokenizer_dir, partial)
            values = {"version": VERSION, "parts": parts, "model": dataclasses.asdict(config)}
            if "lora" in parts:
                values["lora"] = dataclasses.asdict(factors)
            if kind := integers.kind(arrays):
                values["weights"] = kind
            write_json(partial / "config.json", values)
    multihost_utils.sync_global_devices(f"{directory} named")


def write(directory, arrays):
    """Writes the Orbax directory so that each layer can be read alone.

    All processes write jax arrays together. Other arrays are written chunk by chunk, in little memory, by the
    first process.
    """
    if not all(isinstance(a, jax.Array) for a in arrays.values()):
        return chunks.save(directory, nested(arrays, "/"))
    by_layer = ocp.SaveArgs(chunk_byte_size=chunks.CHUNK_BYTES, shard_axes=(0,))
    how = {path: by_layer if "/layers/" in path else ocp.SaveArgs() for path in arrays}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, nested(arrays, "/"), save_args=nested(how, "/"))


def read(directory: str | Path, dtype=None) -> tuple[ModelConfig, dict[str, Lazy], Path | None]:
    """(ModelConfig, {path: Lazy}, tokenizer directory or None).

    Raises:
      CheckpointError: as for `open_native`.
    """
    return *open_native(directory, dtype), fast_tokenizer(directory)


def open_native(directory: str | Path, dtype=None) -> tuple[ModelConfig, dict[str, Lazy]]:
    """(ModelConfig, {path: Lazy}) of the parts in a directory. Values are read when they are used.

    Args:
      directory: written by `save_native`, on any number of devices.
      dtype: type of the arrays but integers and their scales; None keeps the stored types.

    Raises:
      CheckpointError: config.json was not written by this library, or arrays are missing, superfluous or
        misshapen (all are listed). Damaged values raise a CheckpointError too, when they are read.
    """
    directory = located(directory)
    config, stored = stored_arrays(directory)
    return config, integers.typed({path: reader(directory, path, a) for path, a in stored.items()}, dtype)


def reader(directory: Path, path: str, a) -> Lazy:
    """The array at `path` as a Lazy; `a` has its shape and dtype."""
    source = chunks.stored(directory / "arrays", path.replace("/", "."), a.shape, a.dtype)

    def read(spans):
        with named_errors(directory):
            return source.read(spans)

    return Lazy(a.shape, a.dtype, read, f"arrays/{path}")


def stored_arrays(directory):
    """(ModelConfig, {path: shape and type}) of a directory, which must hold whole parts of the model."""
    config, parts = read_config(directory)
    with ocp.StandardCheckpointer() as checkpointer, named_errors(directory):
        stored = flat(checkpointer.metadata(directory / "arrays").item_metadata.tree, "/")
    check(stored, config, parts, directory, read_factors(directory) or NONE)
    said, found = read_json(directory / "config.json").get("weights"), integers.kind(stored)
    if said != found:
        raise CheckpointError(
            f"{directory}/config.json: weights is {said}, but kernels in arrays/ are {found or 'values'}. "
            "Files of two checkpoints were mixed; copy or save it again"
        )
    return config, stored


@contextlib.contextmanager
def named_errors(directory):
    try:
        yield
    except Exception as error:  # Orbax raises a bare Exception for damaged data
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{directory}/arrays cannot be read ({type(error).__name__}: {first_line:.200}). "
            "Copy or save it again."
        ) from error


def is_native(directory: str | Path) -> bool:
    directory = located(directory)
    return (directory / "arrays").is_dir() and (directory / "config.json").is_file()


def read_config(directory: str | Path) -> tuple[ModelConfig, list[str]]:
    """The model's config, and the names of its parts that are there."""
    file = located(directory) / "config.json"
    if not is_native(directory):
        raise CheckpointError(f"{directory}: not a native checkpoint, which has config.json and arrays/")
    values = read_json(file)
    if missing := {"version", "parts", "model"} - values.keys():
        raise CheckpointError(f"{file}: not of this library, it lacks {', '.join(sorted(missing))}")
    require(values, {"version": (VERSION,)}, file)
    config = from_dict(ModelConfig, values["model"])
    config.validate()
    return config, values["parts"]


def read_factors(directory: str | Path) -> LoraConfig | None:
    """What the factors in a directory are; None when it has none."""
    values = read_json(located(directory) / "config.json").get("lora")
    if values is None:
        return None
    factors = from_dict(LoraConfig, values)
    factors.validate()
    return factors


def check(arrays, config: ModelConfig, parts, where, factors: LoraConfig = NONE):
    """Compares the paths and shapes of the arrays with those of the model's `parts`.

    Raises:
      CheckpointError: they differ; all differences are listed.
    """
    wanted = shapes_of(config, *parts, factors=factors)
    found = integers.shapes(arrays)
    problems = [f"{path}: missing" for path in wanted.keys() - found.keys()]
    problems += [f"{path}: the model has no such array" for path in found.keys() - wanted.keys()]
    for path in wanted.keys() & found.keys():
        if found[path] != wanted[path]:
            problems.append(f"{path}: has shape {list(found[path])}, {list(wanted[path])} is needed")
    refuse(sorted(problems), where, "do not fit the model that config.json describes")
