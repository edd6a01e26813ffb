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
GATES = {"swiglu": jax.nn.silu}  # activations of a second map, which the first is multiplied by


class FeedForward(nnx.Module):
    """[..., width] to [..., width] by way of `hidden`: up, an activation, down. Gated (arXiv 2002.05202), where the
    activation is a row of GATES."""

    def __init__(self, width, hidden, activation, bias=True, init=NORMAL, *, rngs):
        self.activation = activation
        self.gate = Linear(width, hidden, bias, init, rngs=rngs) if activation in GATES else None
        self.up = Linear(width, hidden, bias, init, rngs=rngs)
        self.down = Linear(hidden, width, bias, init, rngs=rngs)

    def __call__(self, x, rate=0.0, key=None):
        """`rate` and `key`: dropout of the hidden values."""
        y = self.up(x)
        y = ACTIVATIONS[self.activation](y) if self.gate is None else GATES[self.activation](self.gate(x)) * y
        return self.down(drop(y, rate, key))
