"""Fresh parameters."""

from typing import NamedTuple

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


def linear(rngs, *shape, fan_in):
    """Weight or bias of `torch.nn.Linear`: U(-b, b) with b = 1 / sqrt(fan_in)."""
    return uniform(rngs, shape, fan_in**-0.5)


def packed(rngs, *shape, fan_in):
    """A share of `torch.nn.MultiheadAttention.in_proj_weight`: Xavier's bound, of all [3 * fan_in,
    fan_in]."""
    return uniform(rngs, shape, (6 / (3 * fan_in + fan_in)) ** 0.5)


def uniform(rngs, shape, bound):
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


class Init(NamedTuple):
    """How parameters are drawn: functions (rngs, *shape, fan_in) -> Param."""

    kernel: object  # of a linear map
    bias: object


def no_bias(rngs, *shape, fan_in):
    return zeros(*shape)


NORMAL = Init(dense, no_bias)


class Inits(NamedTuple):
    """What fresh modules are drawn by."""

    linear: Init
    qkv: Init  # queries, keys and values of an attention
    out: Init  # what follows an attention


INITS = {
    "normal": Inits(NORMAL, NORMAL, NORMAL),
    "torch": Inits(Init(linear, linear), Init(packed, no_bias), Init(linear, no_bias)),
}
