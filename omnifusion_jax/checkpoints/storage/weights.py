"""Weights in files: safetensors and torch files are read lazily, safetensors are written."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from omnifusion_jax.checkpoints.storage.lazy_array import in_parallel
from omnifusion_jax.checkpoints.storage.packed import packing, with_packed
from omnifusion_jax.checkpoints.storage.settings import read_json, write_json
from omnifusion_jax.checkpoints.storage.torch_files import read_torch_file, state_dict
from omnifusion_jax.errors import CheckpointError

# Where a Hugging Face directory keeps its weights, in order of preference.
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
TYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}
NAMES = {kind: name for name, kind in TYPES.items()}
SHARD_BYTES = 5_000_000_000  # at most this much in one file of weights, unless one tensor is larger
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def open_tensors(source: str | Path) -> Mapping[str, np.ndarray]:
    """Read-only, memory-mapped arrays by name.

    Nothing is read before it is used, and the files must not change while the arrays are in use. Packed
    weights of a directory come as arrays of values, see storage/packed.py.

    Args:
      source: a .safetensors, .bin or .pt file, or a directory with one of the files of WEIGHTS.

    Raises:
      CheckpointError: there are no weights, a file is malformed, or a file named in the index is missing.
    """
    source = Path(source)
    if source.is_dir():
        how = packing(source)
        found = [source / name for name in WEIGHTS if (source / name).is_file()]
        if not found:
            raise CheckpointError(f"{source}: no weights here; looked for {', '.join(WEIGHTS)}")
        return with_packed(open_tensors(found[0]), how, source)
    if not source.is_file():
        raise CheckpointError(f"{source}: there is no such file")
    if source.suffix == ".json":
        return _sharded(source)
    if source.suffix == ".safetensors":
        return read_safetensors(source)
    return state_dict(read_torch_file(source))


def _sharded(index):
    """The tensors of all files that an index.json names."""
    names = read_json(index).get("weight_map")
    filled = isinstance(names, dict) and bool(names)
    if not filled or not all(isinstance(file, str) and Path(file).name == file for file in names.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to files beside it")
    files = sorted(set(names.values()))
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        verb = "is" if len(missing) == 1 else "are"
        raise CheckpointError(f"{index}: names {', '.join(missing)}, which {verb} missing; download the rest")
    tensors = {}
    for file in files:
        shard = open_tensors(index.parent / file)
        if twice := tensors.keys() & shard.keys():
            raise CheckpointError(
                f"{index.parent / file}: {', '.join(sorted(twice))} stands in another file too"
            )
        tensors |= shard
    if absent := names.keys() - tensors.keys():
        raise CheckpointError(f"{index}: names tensors that no file holds: {', '.join(sorted(absent))}")
    return tensors


def read_safetensors(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of one safetensors file as read-only, memory-mapped arrays.

    The format: a uint64 header length, a JSON header `{name: {dtype, shape, data_offsets}}`, then the
    bytes of all tensors without gaps.

    Raises:
      CheckpointError: the file is truncated, damaged, or of another format.
    """
    empty = Path(path).stat().st_size == 0  # numpy cannot map an empty file
    data = np.zeros(0, np.uint8) if empty else np.asarray(np.memmap(path, np.uint8, "r"))
    if data[:12].tobytes() == b"version http":
        raise CheckpointError(
            f"{path}: a git-lfs pointer, not the file itself. Fetch the content with `git lfs pull`."
        )
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file ({len(data)} bytes). Copy or download it again."
        )
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            start, stop = map(int, entry["data_offsets"])
            entries.append((start, stop, name, TYPES[entry["dtype"]], tuple(map(int, entry["shape"]))))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: the safetensors header is damaged ({type(error).__name__}: {error!s:.200})"
        ) from error
    body, end, tensors = data[8 + length :], 0, {}
    for start, stop, name, kind, shape in sorted(entries, key=lambda e: e[:2]):
        misplaced = start != end or stop > len(body)
        misshapen = min(shape, default=0) < 0 or stop - start != math.prod(shape) * kind.itemsize
        if misplaced or misshapen:
            raise CheckpointError(
                f"{path}: {name} claims bytes {start}..{stop} of {len(body)}. "
                "The file is truncated or damaged; copy it again."
            )
        tensors[name], end = body[start:stop].view(kind).reshape(shape), stop
    if end != len(body):
        raise CheckpointError(
            f"{path}: {len(body) - end} bytes belong to no tensor. The file is damaged; copy it again."
        )
    return tensors


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray]):
    """Writes arrays by name into one file, with the metadata that transformers expects.

    Lazy arrays are read a few at a time, and none is kept.
    """
    header, starts, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name, a in tensors.items():
        header[name] = {
            "dtype": NAMES[a.dtype],
            "shape": list(a.shape),
            "data_offsets": [end, end + a.nbytes],
        }
        starts[name], end = end, end + a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        write_at(file, 0, len(text).to_bytes(8, "little") + text)
        body = 8 + len(text)
        in_parallel(lambda name: write_at(file, body + starts[name], octets(tensors[name])), tensors)
        os.fsync(file.fileno())


def octets(a):
    """The bytes of an array in C order, as uint8[nbytes]."""
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


def write_at(file, offset, data):
    """Writes all of `data` at `offset`.

    One call of `os.pwrite` writes 2 GiB at most, and less where the disk becomes full.
    """
    data = memoryview(data)
    while len(data):
        written = os.pwrite(file.fileno(), data, offset)
        data, offset = data[written:], offset + written


def write_weights(directory: str | Path, tensors: Mapping[str, np.ndarray]):
    """Writes weights into files that are named as transformers names them.

    They are model.safetensors, or several shards of at most SHARD_BYTES and their index. A tensor that is
    larger than that has a shard of its own.
    """
    shards, room = [], 0
    for name, a in tensors.items():
        if not shards or a.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= a.nbytes
    if len(shards) == 1:
        return write_safetensors(Path(directory) / "model.safetensors", tensors)
    files = {f"model-{n:05}-of-{len(shards):05}.safetensors": names for n, names in enumerate(shards, 1)}
    for file, names in files.items():
        write_safetensors(Path(directory) / file, {name: tensors[name] for name in names})
    index = {"metadata": {"total_size": sum(a.nbytes for a in tensors.values())}}
    index["weight_map"] = {name: file for file, names in files.items() for name in names}
    write_json(Path(directory) / "model.safetensors.index.json", index)
