"""An adapter of your own in a config file of your own: a square of patches becomes one embedding.

    python -m omnifusion_jax.train --config=examples/own_adapter.py --workdir=runs/own \\
        --config.model.image.adapter.factor=3

trains it between the bundled encoder and decoder. To load the resulting model, import this file first.
"""

import dataclasses

from omnifusion_jax.config import AdapterConfig, StreamConfig, adapter, check
from omnifusion_jax.models.adapters.base import OfOneEncoder
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import INITS
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.shipped import tiny
from omnifusion_jax.tables import ADAPTERS


@ADAPTERS.row("squares")
class SquaresAdapter(OfOneEncoder, nnx.Module):
    """One linear map over the concatenated features of each square of patches."""

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(AdapterConfig):
        kind: str = "squares"
        factor: int = 2  # patches a side of a square

        def validate(self, stream, width):
            super().validate(stream, width)
            encoder = stream.encoders[0]
            patches_only, side = not encoder.keep_class_token, encoder.side
            check(patches_only, "adapter.kind 'squares': encoder.keep_class_token has no place in the grid")
            divides = self.factor > 0 and side % self.factor == 0
            check(divides, f"adapter.factor {self.factor} does not divide a grid of {side} patches a side")

    @staticmethod
    def rows(c: StreamConfig):
        return SquaresAdapter.side(c) ** 2

    @staticmethod
    def side(c: StreamConfig):
        return c.encoders[0].side // c.adapter.factor

    def __init__(self, c: StreamConfig, width, *, rngs):
        self.factor, self.grid = c.adapter.factor, self.side(c)
        inner = c.encoders[0].width * self.factor**2
        self.linear = Linear(inner, width, init=INITS[c.adapter.init].linear, rngs=rngs)

    def __call__(self, x, key=None):  # [batch, patches, encoder's width]
        n, f = self.grid, self.factor
        x = x.reshape(len(x), n, f, n, f, -1).swapaxes(2, 3)  # [batch, n, n, f, f, encoder's width]
        return self.linear(x.reshape(len(x), n * n, -1))


def get_config(name="pretrain"):
    config = tiny.get_config(name)
    config.model.image.adapter = adapter("squares")
    return config
