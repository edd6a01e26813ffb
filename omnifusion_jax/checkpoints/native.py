"""The library's own checkpoint directory.

    arrays/        Orbax, a plain nested dict by path, no framework types
    config.json    {"version": 1, "parts": ["image/adapter", "special"], "model": {...}}: what is there, and the ModelConfig it belongs to
    tokenizer.json, tokenizer_config.json, ...    the tokenizer's files, where there is one

Phase-1 checkpoints hold only what was trained; `parts` says so.
"""

import contextlib
import dataclasses
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import refuse
from omnifusion_jax.checkpoints.storage import chunks
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.settings import read_json, require, write_json
from omnifusion_jax.checkpoints.storage.staging import check_free, unfinished, written_beside
from omnifusion_jax.checkpoints.tokenizers import copy_tokenizer, fast_tokenizer
from omnifusion_jax.config import ModelConfig, from_dict, part_of
from omnifusion_jax.errors import CheckpointError

VERSION = 1


def save_native(directory, config: ModelConfig, arrays, tokenizer_dir=None):
    """Writes whole parts of a model: {path: Lazy, numpy or jax array}. The directory has its name only when it is complete.

    Every process of a job calls this, with global arrays.

    Raises:
      CheckpointError: the directory exists and is not empty, the disk is full, or the arrays are not whole parts of the model that `config`
        describes.
    """
    parts = sorted(set(map(part_of, arrays)))
    check(arrays, config, parts, directory)
    directory = Path(directory).absolute()
    check_free(directory)  # in every process: one that stopped alone would leave the others waiting
    first = jax.process_index() == 0  # it alone makes and names the directory
    size = (
        sum(a.nbytes for a in arrays.values()) if jax.process_count() == 1 else 0
    )  # or one refuses, and the others wait for it
    with (
        written_beside(directory, size) if first else contextlib.nullcontext(unfinished(directory)) as partial
    ):
        multihost_utils.sync_global_devices(f"{directory} begun")
        write(partial / "arrays", arrays)
        if first:
            if tokenizer_dir is not None:
                copy_tokenizer(tokenizer_dir, partial)
            write_json(
                partial / "config.json",
                {"version": VERSION, "parts": parts, "model": dataclasses.asdict(config)},
            )
    multihost_utils.sync_global_devices(f"{directory} named")


def write(directory, arrays):
    """The Orbax directory. jax arrays are written by all processes, others in little memory by the first; either way a layer can be read alone."""
    if not all(isinstance(a, jax.Array) for a in arrays.values()):
        return chunks.save(directory, nested(arrays))
    by_layer = ocp.SaveArgs(chunk_byte_size=chunks.CHUNK_BYTES, shard_axes=(0,))
    how = {path: by_layer if "/layers/" in path else ocp.SaveArgs() for path in arrays}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, nested(arrays), save_args=nested(how))


def read(directory, dtype=None):
    """(ModelConfig, {path: Lazy}, tokenizer directory or None). Raises CheckpointError as `open_native` does."""
    return *open_native(directory, dtype), fast_tokenizer(directory)


def open_native(directory, dtype=None):
    """What is there: (ModelConfig, {path: Lazy}); values are read when they are used.

    Args:
      directory: written by `save_native`, on any number of devices.
      dtype: type of the arrays; None keeps what is stored.

    Raises:
      CheckpointError: config.json is not one of this library, or arrays are missing, too many or misshapen (all are
        listed). Damage to values shows when they are read, as a CheckpointError too.
    """
    directory = Path(directory).absolute()
    config, stored = stored_arrays(directory)
    return config, {path: reader(directory, path, a).astype(dtype or a.dtype) for path, a in stored.items()}


def reader(directory, path, a):
    source = chunks.stored(directory / "arrays", path.replace("/", "."), a.shape, a.dtype)

    def read(spans):
        with named_errors(directory):
            return source.read(spans)

    return Lazy(a.shape, a.dtype, read, f"arrays/{path}")


def stored_arrays(directory):
    """The config, and shape and type of every array that is there; they are whole parts of the model."""
    config, parts = read_config(directory)
    with ocp.StandardCheckpointer() as checkpointer, named_errors(directory):
        stored = flat(checkpointer.metadata(directory / "arrays").item_metadata.tree)
    check(stored, config, parts, directory)
    return config, stored


@contextlib.contextmanager
def named_errors(directory):
    try:
        yield
    except Exception as error:  # Orbax raises a bare Exception for damaged data
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{directory}/arrays cannot be read ({type(error).__name__}: {first_line:.200}). Copy or save it again."
        ) from error


def is_native(directory):
    return (Path(directory) / "arrays").is_dir() and (Path(directory) / "config.json").is_file()


def read_config(directory) -> tuple[ModelConfig, list[str]]:
    """The model's config, and which of its `parts` are there."""
    file = Path(directory) / "config.json"
    if not is_native(directory):
        raise CheckpointError(f"{directory}: not a native checkpoint, which has config.json and arrays/")
    values = read_json(file)
    if missing := {"version", "parts", "model"} - values.keys():
        raise CheckpointError(f"{file}: not of this library, it lacks {', '.join(sorted(missing))}")
    require(values, {"version": (VERSION,)}, file)
    config = from_dict(ModelConfig, values["model"])
    config.validate()
    return config, values["parts"]


def check(arrays, config, parts, where):
    """Compares the arrays' paths and shapes with those of the model's `parts`; every difference is in the CheckpointError."""
    wanted = shapes_of(config, *parts)
    problems = [f"{path}: missing" for path in wanted.keys() - arrays.keys()]
    problems += [f"{path}: the model has no such array" for path in arrays.keys() - wanted.keys()]
    for path in wanted.keys() & arrays.keys():
        if tuple(arrays[path].shape) != wanted[path]:
            problems.append(f"{path}: has shape {list(arrays[path].shape)}, {list(wanted[path])} is needed")
    refuse(sorted(problems), where, "do not fit the model that config.json describes")


def nested(arrays):
    """{"a/b": x} to {"a": {"b": x}}"""
    tree = {}
    for path, a in arrays.items():
        *parents, name = path.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = a
    return tree


def flat(tree, prefix=""):
    """{"a": {"b": x}} to {"a/b": x}"""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
