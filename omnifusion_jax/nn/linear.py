"""A linear map that keeps its dimensions apart."""

import math

import jax.numpy as jnp

from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import NORMAL


class Linear(nnx.Module):
    """x [..., *ins] to [..., *outs]: `kernel` [*ins, *outs] and, if there is one, `bias` [*outs].

    Kernels keep heads and head_dim apart, so that a sharding rule can name each of them and no reshape hides one.
    """

    def __init__(self, ins, outs, bias=True, init=NORMAL, *, rngs):
        """`ins` and `outs`: an int, or a tuple of them."""
        ins, outs = ((n,) if isinstance(n, int) else tuple(n) for n in (ins, outs))
        fan_in = math.prod(ins)
        self.contracted = len(ins)
        self.kernel = init.kernel(rngs, *ins, *outs, fan_in=fan_in)
        self.bias = init.bias(rngs, *outs, fan_in=fan_in) if bias else None

    def __call__(self, x):
        y = jnp.tensordot(x, self.kernel[...], self.contracted)
        return y if self.bias is None else y + self.bias[...]
