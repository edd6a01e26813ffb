"""Packed weights of others as kernels of integers in the form of nn/quantized.py: the same values."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from omnifusion_jax.checkpoints.integers import on_host
from omnifusion_jax.checkpoints.mapping.transforms import Transform
from omnifusion_jax.checkpoints.storage.packed import Packed
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.lora import KERNEL
from omnifusion_jax.nn import quantized


def kernels(path: str, shape: tuple, sources: Mapping) -> dict[str, tuple]:
    """{path: (shape, dtype, sources)} of a kernel [layers, *ins, *outs] and of what stands beside it.

    `sources` is {row: (piece, tensor)}, as that of the kernel. There is nothing where the kernel is not made
    of packed weights or cannot be kept as integers: then values are read.
    """
    packed = [tensor for _, tensor in sources.values() if isinstance(tensor, Packed)]
    if not packed or not re.fullmatch(KERNEL, path):
        return {}
    if len(packed) < len(sources):
        raise CheckpointError(
            f"{path}: {len(packed)} of {len(sources)} layers are packed integers, which is not supported"
        )
    found = {}
    for end, (dims, dtype, what, change) in arrays_of(shape[1:], packed).items():
        changed = {row: instead(*pair, what, change) for row, pair in sources.items()}
        found[path + end] = (*shape[:1], *dims), dtype, changed
    return found


def arrays_of(dims: tuple, tensors: Sequence[Packed]) -> dict[str, tuple]:
    """Of a layer's kernel [*ins, *outs] and of what stands beside it, by the end of its path:

    (shape, dtype, which array of a Packed it is made of, change from the shape of the kernel to its own).
    """
    one = tensors[0]
    count = next(n for n in range(1, len(dims)) if math.prod(dims[:n]) == one.shape[1])  # dimensions of ins
    whole = one.how.bits == 8 and one.group == one.shape[1]  # one scale for an output, as `Linear` likes it
    block = math.gcd(one.group, dims[count - 1])
    blocks = (1,) * count if whole else (*dims[: count - 1], dims[count - 1] // block)
    scales = (*blocks, *dims[count:])
    firsts = tuple(slice(None, None, n // m) for n, m in zip(dims, scales, strict=True))
    of_block = lambda a: a[firsts]
    found = {
        "": (dims, np.dtype(np.int8), "integers", lambda a: a),
        "_scale": (scales, one.dtype, "scales", of_block),
    }
    if one.how.bits == 4:
        halved = tuple(n // 2 if i == count - 1 else n for i, n in enumerate(dims))
        found[""] = halved, np.dtype(np.uint8), "integers", on_host(quantized.packed, scales)
    if not one.how.symmetric:
        found["_zero"] = scales, np.dtype(np.int8), "zeros", of_block
    if not all(a.ordered for a in tensors):
        first = (..., *(0,) * (len(dims) - count))
        found["_order"] = dims[:count], np.dtype(np.int32), "places", lambda a: a[first]
    return found


def instead(piece, tensor: Packed, what: str, change: Callable):
    """A piece and its tensor, with the array `what` in place of the values."""
    forward = lambda a: change(piece.transform.forward(a))
    return dataclasses.replace(piece, transform=Transform(forward)), getattr(tensor, what)
