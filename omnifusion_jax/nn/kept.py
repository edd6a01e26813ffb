"""Keys and values as a cache keeps them: as they are, or in 8 bits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LARGEST = 127


class Rounded(NamedTuple):
    """Keys or values in 8 bits, with a scale for each position of each head."""

    values: jax.Array  # int8[batch, kv_heads, length, head_dim], between -LARGEST and LARGEST
    scale: jax.Array  # float32[batch, kv_heads, length, 1]: what 1 stands for


def kept(a, dtype):
    """Keys or values [batch, kv_heads, length, head_dim] as a cache of `dtype` keeps them.

    Of int8 they are Rounded, otherwise an array.
    """
    if jnp.dtype(dtype) != jnp.int8:
        return a.astype(dtype)
    a = a.astype(jnp.float32)
    scale = jnp.abs(a).max(-1, keepdims=True) / LARGEST
    return Rounded(jnp.round(a / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale)


def nothing(shape, dtype):
    """Zeros as a cache of `dtype` keeps them, made as such: XLA would compute the scales when it compiles."""
    if jnp.dtype(dtype) != jnp.int8:
        return jnp.zeros(shape, dtype)
    return Rounded(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1)))


def seen(a, dtype):
    """What a cache keeps, as an array of `dtype`; of 8 bits the largest error is half a scale."""
    return (a.values * a.scale).astype(dtype) if isinstance(a, Rounded) else a


def dtype_of(cache):
    """The dtype of a whole cache, or of the keys or values of a layer: int8 if they are Rounded."""
    return jax.tree.leaves(cache)[0].dtype
