"""Kernels of 8 or 4 bits, for maps that are not trained.

A block of values along the last dimension of a map's inputs shares a scale: value = integer * scale. The
integers are symmetric about zero.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 64  # values that share a scale; a dimension that is no multiple of it is one block
KINDS = {"int8": jnp.int8, "int4": jnp.int4}


def scales_shape(shape, axis: int) -> tuple[int, ...]:
    """The shape of a kernel's scales, for blocks along one of its dimensions."""
    size = shape[axis]
    return *shape[:axis], 1 if size % BLOCK else size // BLOCK, *shape[axis + 1 :]


def quantise(kernel, scales_shape, kind: str):
    """(integers of the kernel's shape, their scales in bfloat16), of the kind int8 or int4.

    The scales are rounded first, so that the integers make up for it.
    """
    parts, axis = in_blocks(kernel, scales_shape)
    parts = parts.astype(jnp.float32)
    most = jnp.iinfo(KINDS[kind]).max
    scales = (jnp.abs(parts).max(axis=axis, keepdims=True) / most).astype(jnp.bfloat16)
    found = jnp.round(parts / jnp.where(scales > 0, scales, 1).astype(jnp.float32))
    codes = jnp.clip(found, -most, most).astype(KINDS[kind])
    return codes.reshape(kernel.shape), scales.reshape(scales_shape)


def values(codes, scales, dtype=jnp.float32):
    """The kernel that integers and their scales stand for."""
    parts, axis = in_blocks(codes, scales.shape)
    found = parts.astype(jnp.float32) * jnp.expand_dims(scales, axis).astype(jnp.float32)
    return found.astype(dtype).reshape(codes.shape)


def in_blocks(kernel, scales_shape):
    """(the kernel with a dimension for the values of a block after that of the blocks, its number)."""
    pairs = enumerate(zip(kernel.shape, scales_shape, strict=True))
    axis = next((i for i, (size, blocks) in pairs if size != blocks), 0)
    return kernel.reshape(*scales_shape[: axis + 1], -1, *kernel.shape[axis + 1 :]), axis + 1


@functools.partial(jax.checkpoint, static_argnums=3)
def product(x, codes, scales, contracted: int):
    """x [..., *ins] times the kernel [*ins, *outs] of integers and scales; `contracted` counts ins.

    The backward pass makes the kernel's values again: kept for it, they would be those of all layers.
    """
    return jnp.tensordot(x, values(codes, scales, x.dtype), contracted)
