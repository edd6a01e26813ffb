"""The feed-forward part of a block."""

import jax
import jax.numpy as jnp

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

    It is gated (arXiv 2002.05202) if the activation is a row of GATES. Then, where a model answers, the maps
    that are `together` may be one, `joined`, with outputs [2, hidden].
    """

    joined = None

    def __init__(self, width: int, hidden: int, activation: str, bias=True, init=NORMAL, *, rngs: nnx.Rngs):
        self.activation, self.together = activation, ("gate", "up") if activation in GATES else ()
        self.gate = Linear(width, hidden, bias, init, rngs=rngs) if activation in GATES else None
        self.up = Linear(width, hidden, bias, init, rngs=rngs)
        self.down = Linear(hidden, width, bias, init, rngs=rngs)

    def __call__(self, x, rate=0.0, key=None):
        """Maps x [..., width] to [..., width]; `rate` and `key` are for dropout on the hidden values."""
        return self.down(drop(self.hidden(x), rate, key))

    def hidden(self, x):
        """What goes into the map down, [..., hidden]."""
        if not self.together:
            return ACTIVATIONS[self.activation](self.up(x))
        pair = (self.gate(x), self.up(x)) if self.joined is None else jnp.moveaxis(self.joined(x), -2, 0)
        return GATES[self.activation](pair[0]) * pair[1]
