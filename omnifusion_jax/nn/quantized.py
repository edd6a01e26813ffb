"""Kernels of 8 or 4 bits, for maps that are not trained.

A block of values along the last dimension of a map's inputs shares a scale: value = integer * scale. The
integers are symmetric about zero. Two of 4 bits share a byte, the first half of a block the lower bits and
the second half the upper ones: JAX has a type of 4 bits, but programs compiled ahead of time for a CPU refuse
arrays of it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64  # values that share a scale; a dimension that is no multiple of it is one block
LARGEST = {"int8": 127, "int4": 7}
KINDS = {np.dtype(np.int8): "int8", np.dtype(np.uint8): "int4"}  # of the arrays that hold the integers


def scales_shape(shape, axis: int) -> tuple[int, ...]:
    """The shape of a kernel's scales, for blocks along one of its dimensions."""
    size = shape[axis]
    return *shape[:axis], 1 if size % BLOCK else size // BLOCK, *shape[axis + 1 :]


def quantise(kernel, scales_shape, kind: str):
    """(integers, their scales in bfloat16), of the kind int8 or int4.

    The integers are int8 of the kernel's shape; or uint8, two in each, with half as many along the dimension
    of the blocks. The scales are rounded first, so that the integers make up for it.
    """
    parts, axis = in_blocks(kernel, scales_shape)
    parts, most = parts.astype(jnp.float32), LARGEST[kind]
    scales = (jnp.abs(parts).max(axis=axis, keepdims=True) / most).astype(jnp.bfloat16)
    found = jnp.round(parts / jnp.where(scales > 0, scales, 1).astype(jnp.float32))
    codes = jnp.clip(found, -most, most).astype(jnp.int8)
    if kind == "int4":
        low, high = jnp.split((codes + 8).astype(jnp.uint8), 2, axis=axis)
        codes = low | high << 4
    shape = (*kernel.shape[: axis - 1], -1, *kernel.shape[axis:])
    return codes.reshape(shape), scales.reshape(scales_shape)


def values(codes, scales, dtype=jnp.float32):
    """The kernel that integers and their scales stand for."""
    parts, axis = in_blocks(codes, scales.shape)
    if codes.dtype == jnp.uint8:
        parts = jnp.concatenate([parts & 15, parts >> 4], axis=axis).astype(jnp.int8) - 8
    found = parts.astype(jnp.float32) * jnp.expand_dims(scales, axis).astype(jnp.float32)
    shape = (*codes.shape[: axis - 1], -1, *codes.shape[axis:])
    return found.astype(dtype).reshape(shape)


def belong(codes, scales) -> bool:
    """Whether arrays, or anything with their shape and dtype, can be integers and their scales."""
    pairs = zip(codes.shape, scales.shape, strict=False)
    whole = len(codes.shape) == len(scales.shape) and all(n and size % n == 0 for size, n in pairs)
    return whole and np.dtype(codes.dtype) in KINDS


def values_shape(codes, scales) -> tuple[int, ...]:
    """The shape of the kernel that integers and their scales stand for; of both, shape and dtype count."""
    axis, shape = axis_of(codes.shape, scales.shape), list(codes.shape)
    shape[axis] *= 2 if KINDS[np.dtype(codes.dtype)] == "int4" else 1
    return tuple(shape)


def axis_of(shape, scales_shape) -> int:
    """The dimension along which blocks lie."""
    pairs = enumerate(zip(shape, scales_shape, strict=True))
    return next((i for i, (size, blocks) in pairs if size != blocks), 0)


def in_blocks(a, scales_shape):
    """(the array with a dimension for what a block holds after that of the blocks, its number)."""
    axis = axis_of(a.shape, scales_shape)
    return a.reshape(*scales_shape[: axis + 1], -1, *a.shape[axis + 1 :]), axis + 1


@functools.partial(jax.checkpoint, static_argnums=3)
def product(x, codes, scales, contracted: int):
    """x [..., *ins] times the kernel [*ins, *outs] of integers and scales; `contracted` counts ins.

    The backward pass makes the kernel's values again: kept for it, they would be those of all layers.
    """
    return jnp.tensordot(x, values(codes, scales, x.dtype), contracted)
