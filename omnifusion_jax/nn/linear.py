"""A linear map that keeps its dimensions apart."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

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
        y = product(x, self.kernel[...], self.contracted)
        return y if self.bias is None else y + self.bias[...]


def product(x, kernel, contracted: int = 1, dtype=None):
    """x [..., *ins] times kernel [*ins, *outs], in the dtype of x; `contracted` is the number of ins.

    `dtype` is that of the result, by default that of x. The gradient of the kernel leaves its product in the
    kernel's dtype: under bfloat16 activations that of a float32 kernel is never rounded to bfloat16, and
    devices sum their parts of it in float32.
    """
    return multiply(x, kernel, contracted, x.dtype, dtype or x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def multiply(x, kernel, contracted, inside, dtype):
    return jnp.tensordot(x, kernel.astype(inside), contracted, preferred_element_type=dtype)


def forward(x, kernel, contracted, inside, dtype):
    y = multiply(x.value, kernel.value, contracted, inside, dtype)
    return y, (x.value if kernel.perturbed else None, kernel.value)  # a frozen kernel needs no activations


def backward(contracted, inside, dtype, kept, dy):
    x, kernel = kept
    if isinstance(dy, SymbolicZero):
        return None, None
    dy, outs = dy.astype(inside), kernel.ndim - contracted
    axes = list(range(-outs, 0))
    dx = jnp.tensordot(dy, kernel.astype(inside), (axes, axes))
    if x is None:
        return dx, None
    rows = list(range(dy.ndim - outs))
    return dx, jnp.tensordot(x, dy, (rows, rows), preferred_element_type=kernel.dtype)


multiply.defvjp(forward, backward, symbolic_zeros=True)
