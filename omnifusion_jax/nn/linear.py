"""A linear map that keeps its dimensions apart."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from omnifusion_jax import sharding
from omnifusion_jax.nn import loops, nnx, quantized
from omnifusion_jax.nn.dropout import drop
from omnifusion_jax.nn.init import NORMAL, Init, linear, zeros


class Linear(nnx.Module):
    """Maps x [..., *ins] to [..., *outs] by a `kernel` [*ins, *outs] and optionally a `bias` [*outs].

    Kernels keep heads and head_dim apart, so that a sharding rule can name each of them and no reshape
    hides one.

    Beside a frozen kernel there may be a pair of factors that are trained in its stead, and what makes its
    values of integers: scales, and of foreign ones perhaps zeros, and the order that its inputs stand in.
    In a step of training there may be a key for dropout before the factors, see `models.lora.set_dropping`.
    """

    lora_a = lora_b = lora_key = kernel_scale = kernel_zero = kernel_order = None
    by_output = False  # whether the outputs of a kernel of integers have one scale each, and no gradient

    def __init__(
        self,
        ins: int | tuple[int, ...],
        outs: int | tuple[int, ...],
        bias: bool = True,
        init: Init = NORMAL,
        *,
        rngs: nnx.Rngs,
    ):
        self.ins, self.outs = ((n,) if isinstance(n, int) else tuple(n) for n in (ins, outs))
        fan_in = math.prod(self.ins)
        self.kernel = init.kernel(rngs, *self.ins, *self.outs, fan_in=fan_in)
        self.bias = init.bias(rngs, *self.outs, fan_in=fan_in) if bias else None

    def __call__(self, x):
        y = product(x, self.kernel[...], len(self.ins)) if self.kernel_scale is None else self.of_integers(x)
        if self.lora_a is not None:
            kept = x if self.lora_key is None else drop(x, self.lora_dropout, self.lora_key[...])
            low = product(kept, self.lora_a[...], len(self.ins))  # [..., rank]
            y = y + product(low * self.lora_scale, self.lora_b[...])
        return y if self.bias is None else y + self.bias[...]

    def of_integers(self, x):
        """x times the kernel, which is integers."""
        codes, scales, contracted = self.kernel[...], self.kernel_scale[...], len(self.ins)
        if self.kernel_order is not None:
            rows = x.reshape(*x.shape[: x.ndim - contracted], -1)
            x = rows[..., self.kernel_order[...].reshape(-1)].reshape(x.shape)
        if self.by_output:
            return quantized.product_by_output(x, codes, scales, tuple(range(contracted)))
        zeros = None if self.kernel_zero is None else self.kernel_zero[...]
        return quantized.product(x, codes, scales, contracted, zeros)

    @property
    def layers(self) -> tuple[int, ...]:
        """What stands before the dimensions of the map: the number of layers, if this is a stack of maps."""
        return self.kernel.shape[: -len(self.ins + self.outs)]

    def add_factors(self, rank: int, alpha: float, dropout: float = 0.0, *, rngs: nnx.Rngs):
        """Adds alpha / rank * x @ lora_a @ lora_b to what the map gives (LoRA, arXiv 2106.09685).

        lora_a [*ins, rank] is drawn as PEFT draws it, and lora_b [rank, *outs] is zero: nothing changes yet.
        While there is a `lora_key`, the share `dropout` of this x is dropped.
        """
        self.lora_scale, self.lora_dropout = alpha / rank, dropout
        self.lora_a = linear(rngs, *self.layers, *self.ins, rank, fan_in=math.prod(self.ins))
        self.lora_b = zeros(*self.layers, rank, *self.outs)

    def scales_shape(self, whole: bool = False) -> tuple[int, ...]:
        """The shape of the scales of a kernel of integers, as `quantized.quantise` gives them.

        `whole`: one for each output, not one for each block of its inputs.
        """
        if whole:
            return *self.layers, *(1,) * len(self.ins), *self.outs
        return quantized.scales_shape(self.kernel.shape, len(self.layers + self.ins) - 1)

    def add_scales(self):
        """Makes room for the scales of a kernel of integers."""
        self.kernel_scale = zeros(*self.scales_shape())


def product(x, kernel, contracted: int = 1, dtype=None):
    """x [..., *ins] times kernel [*ins, *outs], in the dtype of x; `contracted` is the number of ins.

    `dtype` is that of the result, by default that of x. The gradient of the kernel leaves its product in the
    kernel's dtype: under bfloat16 activations that of a float32 kernel is never rounded to bfloat16, and
    devices sum their parts of it in float32.
    """
    return multiply(x, kernel, contracted, x.dtype, dtype or x.dtype)


def product_turned(x, kernel, dtype=None):
    """x [..., ins] times kernel [outs, ins], transposed; otherwise as `product`.

    Of a kernel that is turned beforehand, loops would be given a copy. Where they are allowed there is no
    gradient.
    """
    dtype = dtype or x.dtype
    if loops.takes(x, kernel, 1, dtype):
        return loops.product_turned(x, kernel)
    return product(x, kernel.T, dtype=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def multiply(x, kernel, contracted, inside, dtype):
    if loops.takes(x, kernel, contracted, inside, dtype):
        return loops.product(x, kernel, contracted)
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
    return dx, gradient(x, dy, dy.ndim - outs, kernel.dtype)


def gradient(x, dy, rows: int, dtype):
    """The gradient of a kernel, dtype[*ins, *outs]: x [..., *ins] times dy [..., *outs], over `rows` axes.

    Where devices sum in two stages, the first leaves a sum for each index of the second.
    """
    cut = sharding.stages(len(x))
    if cut is None:
        if x.dtype == dtype and sharding.alone():
            # Over several axes XLA transposes an operand, slowly on a CPU; over one it refuses bfloat16.
            x, dy, rows = x.reshape(-1, *x.shape[rows:]), dy.reshape(-1, *dy.shape[rows:]), 1
        axes = list(range(rows))
        return jnp.tensordot(x, dy, (axes, axes), preferred_element_type=dtype)
    x, dy = (a.reshape(*cut, -1, *a.shape[1:]) for a in (x, dy))  # [data, first, second, rows, ...]
    summed, kept = (1, *range(3, 3 + rows)), (0, 2)
    sums = jax.lax.dot_general(x, dy, ((summed, summed), (kept, kept)), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(sums).sum((0, 1))  # XLA would make one stage of both


multiply.defvjp(forward, backward, symbolic_zeros=True)
