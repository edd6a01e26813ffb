"""A linear map that keeps its dimensions apart."""

import math

import jax.numpy as jnp

from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import NORMAL, Init


class Linear(nnx.Module):
    """Maps x [..., *ins] to [..., *outs] by a `kernel` [*ins, *outs] and optionally a `bias` [*outs].

    Kernels keep heads and head_dim apart, so that a sharding rule can name each of them and no reshape
    hides one.
    """

    def __init__(
        self,
        ins: int | tuple[int, ...],
        outs: int | tuple[int, ...],
        bias: bool = True,
        init: Init = NORMAL,
        *,
        rngs: nnx.Rngs,
    ):
        ins, outs = ((n,) if isinstance(n, int) else tuple(n) for n in (ins, outs))
        fan_in = math.prod(ins)
        self.contracted = len(ins)
        self.kernel = init.kernel(rngs, *ins, *outs, fan_in=fan_in)
        self.bias = init.bias(rngs, *outs, fan_in=fan_in) if bias else None

    def __call__(self, x):
        y = jnp.tensordot(x, self.kernel[...], self.contracted)
        return y if self.bias is None else y + self.bias[...]
