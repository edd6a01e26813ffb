"""Conversion as data: one engine reads the same table on import and on export.

A table maps a foreign tensor's name to our path and an array transform. `{}` in the name stands for a layer's
number. Our path then names a stacked array with a leading `layers` axis, and the number picks the row:

    "model.layers.{}.self_attn.k_proj.weight": ("decoder/layers/attention/key", split_out(kv_heads, head_dim))

A foreign tensor may hold several of our arrays, one after the other along its first axis. Its value in the
table is Fused((path, transform), (path, transform), ...).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.checkpoints.mapping.packed import kernels
from omnifusion_jax.checkpoints.mapping.transforms import Fused, Transform
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, forget, in_order
from omnifusion_jax.checkpoints.storage.packed import idle
from omnifusion_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a foreign tensor that goes into one of our arrays, or into one row of a stacked array."""

    path: str  # of our array
    row: int | None  # of the stacked array; None for a whole array
    transform: Transform
    rows: slice  # of the foreign tensor's first axis

    def __str__(self):
        return self.path if self.row is None else f"{self.path}[{self.row}]"


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where one foreign tensor goes."""

    pieces: tuple[Piece, ...]
    shape: tuple  # the one that the foreign tensor must have

    def __str__(self):
        return " and ".join(map(str, self.pieces))


def destinations(table: Mapping[str, tuple], shapes: Mapping[str, tuple]) -> dict[str, Destination]:
    """The destination of every foreign name that the table has for our arrays.

    `shapes` are those of our arrays, by path. Nothing is read, and no array takes memory.
    """
    found = {}
    for name, value in table.items():
        parts = _fused(value)
        if not all(path in shapes for path, _ in parts):
            continue
        if "{}" not in name:
            found[name] = _destination(parts, None, shapes)
            continue
        first_path, _ = parts[0]
        layers = shapes[first_path][0]
        for row in range(layers):
            found[name.format(row)] = _destination(parts, row, shapes)
    return found


def _fused(value):
    return value if isinstance(value, Fused) else Fused(value)


def _destination(parts, row, shapes):
    pieces, length = [], 0
    for path, transform in parts:
        shape = shapes[path] if row is None else shapes[path][1:]
        blank = np.broadcast_to(np.uint8(0), shape)  # one byte of memory, whatever the shape
        foreign = transform.backward(blank).shape
        stop = length + (foreign[0] if foreign else 0)
        pieces.append(Piece(path, row, transform, slice(length, stop)))
        length = stop
    return Destination(tuple(pieces), (length, *foreign[1:]) if foreign else ())


def from_foreign(
    tensors: Mapping[str, np.ndarray],
    table: Mapping[str, tuple],
    shapes: Mapping[str, tuple],
    where: str | Path,
    *,
    ignore: Sequence[str] = (),
    prefix: str = "",
    dtype=None,
) -> dict[str, Lazy]:
    """Our arrays by path, made from foreign `tensors`. Their values are read when they are used.

    Kernels of packed weights are integers, with what belongs to them beside them.

    Args:
      tensors: foreign arrays by name. Of memory-mapped arrays only the pages that are used are read, and they
        are not kept.
      table: as this module describes it.
      shapes: the shape of every array to fill, by path.
      where: the file or directory of the tensors, for errors.
      ignore: regexes of foreign names that hold nothing of the model.
      prefix: what foreign names may begin with, or may leave out.
      dtype: of the arrays but integers; None keeps that of the tensors.

    Raises:
      CheckpointError: lists every missing, extra, doubly matched, misshapen or wrongly typed tensor at once.
    """
    places = {name.removeprefix(prefix): place for name, place in destinations(table, shapes).items()}
    given, problems = {}, []  # given: the names in `tensors` by the name without the prefix
    for name in tensors:
        if name.removeprefix(prefix) in places:
            given.setdefault(name.removeprefix(prefix), []).append(name)
        elif not any(re.fullmatch(pattern, name) for pattern in ignore) and not idle(name, tensors):
            problems.append(f"{name} -> nowhere: {_stranger(name, table, shapes)}")
    problems += [f"{prefix}{name} -> {place}: missing" for name, place in places.items() if name not in given]
    filled = {piece.path for place in places.values() for piece in place.pieces}
    problems += [
        f"(no name) -> {path}: the format has no place for it" for path in sorted(set(shapes) - filled)
    ]
    # The type of the first tensor found for each path. The order is reversed so that the first is set last.
    first = {
        piece.path: np.dtype(tensors[names[0]].dtype)
        for name, names in reversed(given.items())
        for piece in places[name].pieces
    }
    for name, names in given.items():
        problems += _misfits(names, places[name], tensors, first)
    refuse(problems, where, "do not fit the model")

    sources = {path: {} for path in shapes}
    for name, [theirs] in given.items():
        for piece in places[name].pieces:
            sources[piece.path][piece.row] = piece, tensors[theirs]
    origins = {path: name for name, value in table.items() for path, _ in _fused(value)}
    found = {}
    for path, shape in shapes.items():
        integers = kernels(path, shape, sources[path])
        found |= {name: _ours(*made, origins[path]) for name, made in integers.items()}
        if not integers:
            found[path] = _ours(shape, first[path], sources[path], origins[path]).astype(dtype or first[path])
    return found


def _ours(shape, dtype, sources, origin):
    """One of our arrays. `sources` has (piece, foreign tensor) by row."""

    def part(row, spans):
        piece, tensor = sources[row]
        tensor = np.asarray(tensor)
        found = in_order(piece.transform.forward(tensor[piece.rows] if tensor.ndim else tensor)[spans])
        forget(tensor)
        return found

    def read(spans):
        if None in sources:
            return part(None, spans)
        rows = [part(row, spans[1:]) for row in range(spans[0].start, spans[0].stop)]
        if not rows:
            return np.empty((0, *shape[1:]), dtype)
        return np.stack(rows) if len(rows) > 1 else rows[0][None]  # one row is not copied again

    return Lazy(shape, dtype, read, origin)


def to_foreign(arrays: Mapping[str, np.ndarray], table: Mapping[str, tuple]) -> dict[str, Lazy]:
    """Foreign tensors by name, made from our `arrays` by path, in the table's order.

    Each is read when it is used, and needs only its own row of a stacked array.

    Raises:
      CheckpointError: an array has no place in the table, or the table names an array that is missing.
    """
    paths = {path for value in table.values() for path, _ in _fused(value)}
    problems = [f"{path}: missing" for path in sorted(paths - set(arrays))]
    problems += [f"{path}: the format has no place for it" for path in sorted(set(arrays) - paths)]
    refuse(problems, "export", "do not fit the format")
    shapes = {path: a.shape for path, a in arrays.items()}
    return {name: _theirs(place, arrays) for name, place in destinations(table, shapes).items()}


def _theirs(place, arrays):
    """One foreign tensor. It is transformed as a whole, then sliced."""

    def part(piece):
        a = arrays[piece.path]
        return piece.transform.backward(np.asarray(a if piece.row is None else a[piece.row]))

    def read(spans):
        parts = [part(piece) for piece in place.pieces]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return in_order(whole[spans])

    return Lazy(place.shape, arrays[place.pieces[0].path].dtype, read)


def refuse(problems: Sequence[str], where: str | Path, what: str):
    """Raises CheckpointError with all `problems`, one a line, where there are any."""
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors {what}:\n  " + "\n  ".join(problems))


def _stranger(name, table, shapes):
    """Why a tensor has no destination. The most frequent reason is a layer that the model does not have."""
    row_name = re.sub(r"\.\d+\.", ".{}.", name, count=1)
    (path, _), *_ = _fused(table.get(row_name, (None, None)))
    if path not in shapes:
        return "the model has no such tensor"
    return f"{path} has {shapes[path][0]} layers"


def _misfits(names, place, tensors, first):
    """What is wrong with the tensors found for one destination."""
    if len(names) > 1:
        yield f"{' and '.join(names)} -> {place}: more than one tensor for one place"
    for name in names:
        shape, kind = tuple(tensors[name].shape), np.dtype(tensors[name].dtype)
        others = {first[piece.path] for piece in place.pieces} - {kind}
        if shape != place.shape:
            yield f"{name} -> {place}: has shape {list(shape)}, {list(place.shape)} is needed"
        if not jnp.issubdtype(kind, jnp.floating):
            yield f"{name} -> {place}: is {kind}, not floating-point (quantized weights are not read)"
        elif others:
            yield f"{name} -> {place}: is {kind}, other layers are {', '.join(map(str, others))}"
