"""Dropout with explicit random keys."""

import jax
import jax.numpy as jnp


def drop(x, rate: float, key):
    """Inverted dropout of x [...]. Without a key, nothing is dropped."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
