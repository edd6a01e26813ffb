"""How fresh parameters are drawn."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnifusion_jax.nn import nnx


def dense(rngs: nnx.Rngs, *shape: int, fan_in: int) -> nnx.Param:
    """A kernel drawn from N(0, 1/fan_in), where 1/fan_in is the variance."""
    return nnx.Param(jax.random.normal(rngs.params(), shape) * fan_in**-0.5)


def zeros(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


def ones(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.ones(shape))


def linear(rngs, *shape, fan_in):
    """The weight or bias of `torch.nn.Linear`: U(-b, b) with b = 1 / sqrt(fan_in)."""
    return uniform(rngs, shape, fan_in**-0.5)


def packed(rngs, *shape, fan_in):
    """A third of `torch.nn.MultiheadAttention.in_proj_weight`: queries, keys or values.

    The bound is Xavier's for the whole weight [3 * fan_in, fan_in].
    """
    return uniform(rngs, shape, (6 / (3 * fan_in + fan_in)) ** 0.5)


def uniform(rngs, shape, bound):
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


class Init(NamedTuple):
    """How a linear map is drawn: two functions (rngs, *shape, fan_in) -> Param."""

    kernel: Callable[..., nnx.Param]
    bias: Callable[..., nnx.Param]


def no_bias(rngs, *shape, fan_in):
    return zeros(*shape)


NORMAL = Init(dense, no_bias)


class Inits(NamedTuple):
    """How the linear maps of a module are drawn."""

    linear: Init  # those outside of attention
    qkv: Init  # projections to queries, keys and values
    out: Init  # the output projection of attention


INITS = {
    "normal": Inits(NORMAL, NORMAL, NORMAL),
    "torch": Inits(Init(linear, linear), Init(packed, no_bias), Init(linear, no_bias)),
}
