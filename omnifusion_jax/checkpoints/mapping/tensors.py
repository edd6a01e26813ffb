"""Conversion as data: one engine reads the same table on import and on export.

A table maps a foreign tensor's name to our path and an array transform. `{}` in the name stands for a layer's number; our path then names a stacked
array with a leading `layers` axis, and the number picks the row:

    "model.layers.{}.self_attn.k_proj.weight": ("decoder/layers/attention/key", split_out(kv_heads, head_dim))

A foreign tensor that holds several of ours, one after the other along its first axis, is Fused((path, transform), (path, transform), ...).
"""

import dataclasses
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.checkpoints.mapping.transforms import Fused, Transform
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, forget, in_order
from omnifusion_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a foreign tensor that goes into a whole array of ours (row None), or into one row of a stacked one."""

    path: str
    row: int | None
    transform: Transform
    rows: slice  # of the foreign tensor's first axis

    def __str__(self):
        return self.path if self.row is None else f"{self.path}[{self.row}]"


@dataclasses.dataclass(frozen=True)
class Destination:
    """Where one foreign tensor goes."""

    pieces: tuple[Piece, ...]
    shape: tuple  # that the foreign tensor must have

    def __str__(self):
        return " and ".join(map(str, self.pieces))


def destinations(table, shapes: Mapping[str, tuple]) -> dict[str, Destination]:
    """Every foreign name the table gives for arrays of `shapes` (ours, by path), and its place. Takes no memory."""
    found = {}
    for name, value in table.items():
        parts = _fused(value)
        if not all(path in shapes for path, _ in parts):
            continue
        for row in range(shapes[parts[0][0]][0]) if "{}" in name else (None,):
            found[name if row is None else name.format(row)] = _destination(parts, row, shapes)
    return found


def _fused(value):
    return value if isinstance(value, Fused) else Fused(value)


def _destination(parts, row, shapes):
    pieces, length = [], 0
    for path, transform in parts:
        shape = shapes[path] if row is None else shapes[path][1:]
        foreign = transform.backward(np.broadcast_to(np.uint8(0), shape)).shape
        stop = length + (foreign[0] if foreign else 0)
        pieces.append(Piece(path, row, transform, slice(length, stop)))
        length = stop
    return Destination(tuple(pieces), (length, *foreign[1:]) if foreign else ())


def from_foreign(tensors, table, shapes, where, *, ignore=(), prefix="", dtype=None) -> dict[str, Lazy]:
    """Our arrays by path, from foreign `tensors` by name; their values are read when they are used.

    Args:
      tensors: mapping of names to arrays; of memory-mapped ones only the pages under what is used are read, and not kept.
      table: see above.
      shapes: the shape of every array to fill, by path.
      where: file or directory, for errors.
      ignore: regexes of foreign names that hold nothing of the model.
      prefix: what foreign names may or may not begin with.
      dtype: type of the result; None keeps the source's.

    Raises:
      CheckpointError: lists every missing, extra, doubly matched or misshapen tensor at once.
    """
    places = {name.removeprefix(prefix): place for name, place in destinations(table, shapes).items()}
    given, problems = {}, []
    for name in tensors:
        if name.removeprefix(prefix) in places:
            given.setdefault(name.removeprefix(prefix), []).append(name)
        elif not any(re.fullmatch(pattern, name) for pattern in ignore):
            problems.append(f"{name} -> nowhere: {_stranger(name, table, shapes)}")
    problems += [f"{prefix}{name} -> {place}: missing" for name, place in places.items() if name not in given]
    filled = {piece.path for place in places.values() for piece in place.pieces}
    problems += [
        f"(no name) -> {path}: the format has no place for it" for path in sorted(set(shapes) - filled)
    ]
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
    return {
        path: _ours(shape, first[path], sources[path], origins[path]).astype(dtype or first[path])
        for path, shape in shapes.items()
    }


def _ours(shape, dtype, sources, origin):
    """One array of ours; `sources` has (piece, foreign tensor) by row."""

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
        return (
            rows[0][None] if len(rows) == 1 else np.stack(rows) if rows else np.empty((0, *shape[1:]), dtype)
        )

    return Lazy(shape, dtype, read, origin)


def to_foreign(arrays, table) -> dict[str, Lazy]:
    """Foreign tensors by name, in the table's order; each is read when it is used, from one row of ours.

    Raises:
      CheckpointError: an array has no place in the table, or the table wants one that is not there.
    """
    paths = {path for value in table.values() for path, _ in _fused(value)}
    problems = [f"{path}: missing" for path in sorted(paths - set(arrays))]
    refuse(
        problems + [f"{path}: the format has no place for it" for path in sorted(set(arrays) - paths)],
        "export",
        "do not fit the format",
    )
    return {
        name: _theirs(place, arrays)
        for name, place in destinations(table, {path: a.shape for path, a in arrays.items()}).items()
    }


def _theirs(place, arrays):
    """One foreign tensor, which is transformed whole and then sliced."""

    def read(spans):
        parts = [
            p.transform.backward(np.asarray(arrays[p.path] if p.row is None else arrays[p.path][p.row]))
            for p in place.pieces
        ]
        return in_order((parts[0] if len(parts) == 1 else np.concatenate(parts))[spans])

    return Lazy(place.shape, arrays[place.pieces[0].path].dtype, read)


def refuse(problems, where, what):
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors {what}:\n  " + "\n  ".join(problems))


def _stranger(name, table, shapes):
    """Why no place takes a tensor: most often a layer too many."""
    (path, _), *_ = _fused(table.get(re.sub(r"\.\d+\.", ".{}.", name, count=1), (None, None)))
    return "the model has no such tensor" if path not in shapes else f"{path} has {shapes[path][0]} layers"


def _misfits(names, place, tensors, first):
    """What is wrong with the tensors found for one place."""
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
