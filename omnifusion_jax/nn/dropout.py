"""Dropout with explicit keys: whoever has none drops nothing."""

import jax
import jax.numpy as jnp


def drop(x, rate, key):
    """Inverted dropout; none without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
