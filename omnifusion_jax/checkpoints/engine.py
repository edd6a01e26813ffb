"""Conversion as data: one engine reads the same table on import and on export.

A table maps a foreign tensor's name to our path and an array transform. `{}` in the name stands for a layer's number; our path then names a stacked
array with a leading `layers` axis, and the number picks the row:

    "model.layers.{}.self_attn.k_proj.weight": ("decoder/layers/attention/key", split_out(kv_heads, head_dim))
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.config import EncoderConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of inverse array maps: `forward` on import, `backward` on export. They only permute and reshape."""

    forward: Callable = lambda a: a
    backward: Callable = lambda a: a


SAME = Transform()
MATRIX = Transform(np.transpose, np.transpose)  # torch Linear [out, in] <-> ours [in, out]


def split_out(*dims):
    """torch [prod(dims), in] <-> ours [in, *dims]"""
    return Transform(lambda a: a.T.reshape(-1, *dims), lambda a: a.reshape(len(a), -1).T)


def split_in(*dims):
    """torch [out, prod(dims)] <-> ours [*dims, out]"""
    return Transform(lambda a: a.T.reshape(*dims, -1), lambda a: a.reshape(-1, a.shape[-1]).T)


def split(*dims):
    """torch [prod(dims)] <-> ours [*dims]"""
    return Transform(lambda a: a.reshape(dims), lambda a: a.reshape(-1))


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one foreign tensor goes: into a whole array of ours (row None), or into one row of a stacked one."""

    path: str
    row: int | None
    transform: Transform
    shape: tuple  # that the foreign tensor must have

    def __str__(self):
        return self.path if self.row is None else f"{self.path}[{self.row}]"


def slots(table, shapes: Mapping[str, tuple]) -> dict[str, Slot]:
    """Every foreign name the table gives for arrays of `shapes` (ours, by path), and its place. Takes no memory."""
    found = {}
    for name, (path, transform) in table.items():
        if path not in shapes:
            continue
        stacked = "{}" in name
        shape = shapes[path][1:] if stacked else shapes[path]
        foreign = transform.backward(np.broadcast_to(np.uint8(0), shape)).shape
        for row in range(shapes[path][0]) if stacked else (None,):
            found[name if row is None else name.format(row)] = Slot(path, row, transform, foreign)
    return found


def from_foreign(tensors, table, shapes, where, *, ignore=(), prefix="", dtype=None) -> dict[str, np.ndarray]:
    """Our arrays by path, from foreign `tensors` by name.

    Args:
      tensors: mapping of names to arrays; memory-mapped ones are read one at a time.
      table: see above.
      shapes: the shape of every array to fill, by path.
      where: file or directory, for errors.
      ignore: regexes of foreign names that hold nothing of the model.
      prefix: what foreign names may or may not begin with.
      dtype: type of the result; None keeps the source's.

    Raises:
      CheckpointError: lists every missing, extra, doubly matched or misshapen tensor at once.
    """
    places = {name.removeprefix(prefix): slot for name, slot in slots(table, shapes).items()}
    sources, problems = {}, []
    for name in tensors:
        slot = places.get(name.removeprefix(prefix))
        if slot is not None:
            sources.setdefault((slot.path, slot.row), []).append((name, slot))
        elif not any(re.fullmatch(pattern, name) for pattern in ignore):
            problems.append(f"{name} -> nowhere: {_stranger(name, table, shapes)}")
    for name, slot in places.items():
        if (slot.path, slot.row) not in sources:
            problems.append(f"{prefix}{name} -> {slot}: missing")
    for path in sorted(set(shapes) - {slot.path for slot in places.values()}):
        problems.append(f"(no name) -> {path}: the format has no place for it")
    first = {path: np.dtype(tensors[hits[0][0]].dtype) for (path, _), hits in reversed(sources.items())}
    for hits in sources.values():
        problems += _misfits(hits, tensors, first)
    refuse(problems, where, "do not fit the model")

    arrays = {path: np.empty(shape, dtype or first[path]) for path, shape in shapes.items()}
    for [(name, slot)] in sources.values():
        arrays[slot.path][... if slot.row is None else slot.row] = slot.transform.forward(tensors[name])
    return arrays


def to_foreign(arrays, table) -> dict[str, np.ndarray]:
    """Foreign tensors by name, in the table's order; views of our arrays wherever numpy can make them.

    Raises:
      CheckpointError: an array has no place in the table, or the table wants one that is not there.
    """
    paths = {path for path, _ in table.values()}
    problems = [f"{path}: missing" for path in sorted(paths - set(arrays))]
    refuse(problems + [f"{path}: the format has no place for it" for path in sorted(set(arrays) - paths)], "export", "do not fit the format")
    held = {path: np.asarray(a) for path, a in arrays.items()}
    places = slots(table, {path: a.shape for path, a in held.items()})
    return {name: s.transform.backward(held[s.path] if s.row is None else held[s.path][s.row]) for name, s in places.items()}


def refuse(problems, where, what):
    if problems:
        raise CheckpointError(f"{where}: {len(problems)} tensors {what}:\n  " + "\n  ".join(problems))


def shapes_of(config: ModelConfig, *parts) -> dict[str, tuple]:
    """Shape of every parameter by path, in whole or of some parts ("encoders", "adapter", "special", "decoder")."""
    found = nnx.parameters(abstract(config))
    return {path: a.shape for path, a in found.items() if not parts or path.split("/")[0] in parts}


def encoder_shapes(config: EncoderConfig) -> dict[str, tuple]:
    """Shape of every parameter of a vision tower, by path within it."""
    found = nnx.parameters(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))
    return {path: a.shape for path, a in found.items()}


def _stranger(name, table, shapes):
    """Why no place takes a tensor: most often a layer too many."""
    path, _ = table.get(re.sub(r"\.\d+\.", ".{}.", name, count=1), (None, None))
    return "the model has no such tensor" if path not in shapes else f"{path} has {shapes[path][0]} layers"


def _misfits(hits, tensors, first):
    """What is wrong with the tensors found for one place."""
    if len(hits) > 1:
        yield f"{' and '.join(name for name, _ in hits)} -> {hits[0][1]}: more than one tensor for one place"
    for name, slot in hits:
        shape, kind = tuple(tensors[name].shape), np.dtype(tensors[name].dtype)
        if shape != slot.shape:
            yield f"{name} -> {slot}: has shape {list(shape)}, {list(slot.shape)} is needed"
        if not jnp.issubdtype(kind, jnp.floating):
            yield f"{name} -> {slot}: is {kind}, not floating-point (quantized weights are not read)"
        elif kind != first[slot.path]:
            yield f"{name} -> {slot}: is {kind}, other layers are {first[slot.path]}"
