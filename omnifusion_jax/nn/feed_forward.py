"""The feed-forward part of a block."""

import jax

from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.dropout import drop
from omnifusion_jax.nn.init import NORMAL
from omnifusion_jax.nn.linear import Linear

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
GATES = {"swiglu": jax.nn.silu}  # activations of the gate, which `up` is multiplied by


class FeedForward(nnx.Module):
    """A linear map up to width `hidden`, an activation, and a linear map down to the width it came from.

    It is gated (arXiv 2002.05202) if the activation is a row of GATES.
    """

    def __init__(self, width: int, hidden: int, activation: str, bias=True, init=NORMAL, *, rngs: nnx.Rngs):
        self.activation = activation
        self.gate = Linear(width, hidden, bias, init, rngs=rngs) if activation in GATES else None
        self.up = Linear(width, hidden, bias, init, rngs=rngs)
        self.down = Linear(hidden, width, bias, init, rngs=rngs)

    def __call__(self, x, rate=0.0, key=None):
        """Maps x [..., width] to [..., width]; `rate` and `key` are for dropout on the hidden values."""
        y = self.up(x)
        y = ACTIVATIONS[self.activation](y) if self.gate is None else GATES[self.activation](self.gate(x)) * y
        return self.down(drop(y, rate, key))
