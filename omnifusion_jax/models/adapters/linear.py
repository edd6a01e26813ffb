"""Adapters made of one linear map, or of two."""

import dataclasses

from omnifusion_jax.config import AdapterConfig, StreamConfig, one_of
from omnifusion_jax.models.adapters.base import OfOneEncoder
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.feed_forward import ACTIVATIONS
from omnifusion_jax.nn.init import INITS
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.tables import ADAPTERS


@ADAPTERS.row("linear")
class LinearAdapter(OfOneEncoder, nnx.Module):
    """One linear map."""

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(AdapterConfig):
        kind: str = "linear"

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        self.linear = Linear(c.encoders[0].width, width, init=INITS[c.adapter.init].linear, rngs=rngs)

    def __call__(self, x, key=None):  # [batch, rows, encoder's width]
        return self.linear(x)


@ADAPTERS.row("mlp")
class MlpAdapter(OfOneEncoder, nnx.Module):
    """Two linear maps with a GELU between them, as in LLaVA-1.5 (arXiv 2310.03744)."""

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(AdapterConfig):
        kind: str = "mlp"
        mlp: int = 2048  # hidden width
        activation: str = "gelu"  # or gelu_tanh

        def validate(self, stream, width):
            super().validate(stream, width)
            one_of("adapter.activation", self.activation, ("gelu", "gelu_tanh"))

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        init, hidden = INITS[c.adapter.init].linear, c.adapter.mlp
        self.activation = c.adapter.activation
        self.up = Linear(c.encoders[0].width, hidden, init=init, rngs=rngs)
        self.linear = Linear(hidden, width, init=init, rngs=rngs)

    def __call__(self, x, key=None):  # [batch, rows, encoder's width]
        return self.linear(ACTIVATIONS[self.activation](self.up(x)))
