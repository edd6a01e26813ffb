"""Kernels of 8 or 4 bits, for maps that are not trained.

A block of values shares a scale: value = integer * scale. Blocks lie along the last dimension of a map's
inputs, or take in all inputs of an output; the shapes of the integers and of the scales say which. Ours are
symmetric about zero; those of others may have a zero for each block: value = (integer - zero) * scale. Two of
4 bits share a byte, the first half of a block the lower bits and the second half the upper ones: JAX has a
type of 4 bits, but programs compiled ahead of time for a CPU refuse arrays of it.
"""

import functools
import math

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


def belong(codes, scales) -> bool:
    """Whether arrays, or anything with a shape and a dtype, can be integers and their scales."""
    pairs = zip(codes.shape, scales.shape, strict=False)
    whole = len(codes.shape) == len(scales.shape) and all(n and size % n == 0 for size, n in pairs)
    return whole and np.dtype(codes.dtype) in KINDS


def values_shape(codes, scales) -> tuple[int, ...]:
    """The shape of the kernel that integers and their scales stand for."""
    shape = list(codes.shape)
    if KINDS[np.dtype(codes.dtype)] == "int4":
        shape[axis_of(codes.shape, scales.shape)] *= 2
    return tuple(shape)


def quantise(kernel, scales_shape, kind: str):
    """(integers, their scales in bfloat16), of the kind int8 or int4.

    The integers are int8 of the kernel's shape; or uint8, two in each, with half as many along the dimension
    of the blocks. The scales are rounded first, so that the integers make up for it.
    """
    parts, most = in_blocks(kernel, scales_shape).astype(jnp.float32), LARGEST[kind]
    inside = tuple(range(1, parts.ndim, 2))
    scales = (jnp.abs(parts).max(axis=inside, keepdims=True) / most).astype(jnp.bfloat16)
    found = jnp.round(parts / jnp.where(scales > 0, scales, 1).astype(jnp.float32))
    codes = jnp.clip(found, -most, most).astype(jnp.int8).reshape(kernel.shape)
    return packed(codes, scales_shape) if kind == "int4" else codes, scales.reshape(scales_shape)


def packed(codes, scales_shape):
    """Integers between -8 and 7, int8, as uint8 that hold two: half as many along the dimension of blocks."""
    axis, shape = axis_of(codes.shape, scales_shape), list(codes.shape)
    low, high = jnp.split(in_blocks(codes + 8, scales_shape).astype(jnp.uint8), 2, axis=2 * axis + 1)
    shape[axis] //= 2
    return (low | high << 4).reshape(shape)


def values(codes, scales, zeros=None, dtype=jnp.float32):
    """The kernel that integers, their scales and, where there are such, their zeros stand for."""
    parts, shape = in_blocks(codes, scales.shape), values_shape(codes, scales)
    if codes.dtype == jnp.uint8:
        inside = 2 * axis_of(codes.shape, scales.shape) + 1
        parts = jnp.concatenate([parts & 15, parts >> 4], axis=inside).astype(jnp.int8) - 8
    found = parts.astype(jnp.float32)
    if zeros is not None:
        found = found - in_blocks(zeros, scales.shape).astype(jnp.float32)
    found = found * in_blocks(scales, scales.shape).astype(jnp.float32)
    return found.astype(dtype).reshape(shape)


def axis_of(shape, scales_shape) -> int:
    """The dimension along which blocks lie, where it is one."""
    pairs = enumerate(zip(shape, scales_shape, strict=True))
    return next((i for i, (size, blocks) in pairs if size != blocks), 0)


def in_blocks(a, scales_shape):
    """The array with each dimension as two: the blocks, and what one of them holds."""
    pairs = zip(a.shape, scales_shape, strict=True)
    return a.reshape([n for size, blocks in pairs for n in (blocks, size // blocks)])


@functools.partial(jax.checkpoint, static_argnums=3)
def product(x, codes, scales, contracted: int, zeros=None):
    """x [..., *ins] times the kernel [*ins, *outs] that `values` gives; `contracted` counts ins.

    The backward pass makes the kernel's values again: kept for it, they would be those of all layers.
    """
    return jnp.tensordot(x, values(codes, scales, zeros, x.dtype), contracted)


def product_by_output(x, codes, scales, axes: tuple[int, ...], dtype=None):
    """x [..., *ins] times int8 codes whose outputs have one scale each: [..., *outs]. It has no gradient.

    `axes` are the dimensions of the codes that are ins, the first ones or the last; the scales have 1 there.
    `dtype` is that of the result, by default that of x. The scale of an output waits until its sum is there.
    So compilers read integers where they would write values first.
    """

    def in_floats(x, codes):
        last = tuple(range(-len(axes), 0))
        return jnp.tensordot(x, codes.astype(x.dtype), (last, axes), preferred_element_type=jnp.float32)

    in_integers = functools.partial(in_two_parts, axes=axes)
    y = jax.lax.platform_dependent(x, codes, cpu=in_integers, default=in_floats)
    return (y * jnp.squeeze(scales, axes).astype(jnp.float32)).astype(dtype or x.dtype)


def in_two_parts(x, codes, axes: tuple[int, ...]):
    """x [..., *ins] times int8 codes as in `product_by_output`, float32[..., *outs]: in integers, on a CPU.

    Each row of x is 254 * high + low, both int8, in units of its largest value / 127 / 254: what it was, to
    15 bits. For a product of floats XLA would write all integers out as floats. The two rows have a second
    reason: XLA gives YNNPACK, which has the instructions for it, no product of one row. Nor one of a matrix
    that is transposed first.
    """
    size, first = math.prod(codes.shape[axis] for axis in axes), axes[0] == 0
    rows = x.astype(jnp.float32).reshape(-1, size)
    most = jnp.abs(rows).max(axis=1, keepdims=True) / 127
    rows = rows / jnp.where(most > 0, most, 1)
    high = jnp.round(rows)
    parts = jnp.concatenate([high, jnp.round((rows - high) * 254)]).astype(jnp.int8)
    matrix = codes.reshape((size, -1) if first else (-1, size))
    summed = (((1,), (0 if first else 1,)), ((), ()))
    sums = jax.lax.dot_general(parts, matrix, summed, preferred_element_type=jnp.int32)
    high, low = jnp.split(sums.astype(jnp.float32), 2)
    y = (high + low / 254) * most  # not a number where a row was not
    outs = (n for axis, n in enumerate(codes.shape) if axis not in axes)
    return y.reshape(*x.shape[: x.ndim - len(axes)], *outs)
