"""Fresh parameters."""

import jax
import jax.numpy as jnp

from omnifusion_jax.nn import nnx


def dense(rngs, *shape, fan_in):
    """A kernel drawn from N(0, 1/fan_in)."""
    return nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)


def zeros(*shape):
    return nnx.Param(jnp.zeros(shape))


def ones(*shape):
    return nnx.Param(jnp.ones(shape))
