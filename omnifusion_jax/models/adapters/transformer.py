"""A transformer layer and a linear map: OmniFusion's adapter, for one encoder or for two."""

import dataclasses

import jax
import jax.numpy as jnp

from omnifusion_jax.config import AdapterConfig, StreamConfig, check
from omnifusion_jax.models.adapters.base import OfOneEncoder
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import Attention
from omnifusion_jax.nn.dropout import drop
from omnifusion_jax.nn.feed_forward import FeedForward
from omnifusion_jax.nn.init import INITS
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.nn.norms import LayerNorm
from omnifusion_jax.tables import ADAPTERS


@dataclasses.dataclass(unsafe_hash=True)
class LayerSettings(AdapterConfig):
    """Settings of a TransformerLayer."""

    heads: int = 4  # of attention
    mlp: int = 2048  # hidden width of the feed-forward part
    dropout: float = 0.1  # in training only
    eps: float = 1e-5  # of norms

    def validate(self, stream, width):
        super().validate(stream, width)
        check(0 <= self.dropout < 1, f"adapter.dropout {self.dropout} is not in [0, 1)")


class TransformerLayer(nnx.Module):
    """`torch.nn.TransformerEncoderLayer`: post-norm, ReLU, no position embedding.

    Dropout is where PyTorch has it: on attention probabilities, after attention, and inside and after the
    feed-forward part.
    """

    def __init__(self, c: LayerSettings, width: int, *, rngs: nnx.Rngs):
        init = INITS[c.init]
        self.dropout = c.dropout
        self.attention = Attention(width, c.heads, init=init, rngs=rngs)
        self.norm1, self.norm2 = LayerNorm(width, c.eps), LayerNorm(width, c.eps)
        self.feed_forward = FeedForward(width, c.mlp, "relu", init=init.linear, rngs=rngs)

    def __call__(self, x, key=None):  # [batch, rows, width]
        rate = self.dropout
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        y, _ = self.attention(x, dropout=(rate, keys[0]))
        x = self.norm1(x + drop(y, rate, keys[1]))
        y = self.feed_forward(x, rate, keys[2])
        return self.norm2(x + drop(y, rate, keys[3]))


@ADAPTERS.row("transformer")
class TransformerAdapter(OfOneEncoder, nnx.Module):
    """One transformer layer, then a linear map."""

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(LayerSettings):
        kind: str = "transformer"

        def validate(self, stream, width):
            super().validate(stream, width)
            divides(self.heads, stream.encoders[0].width)

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        inner = c.encoders[0].width
        self.layer = TransformerLayer(c.adapter, inner, rngs=rngs)
        self.linear = Linear(inner, width, init=INITS[c.adapter.init].linear, rngs=rngs)

    def __call__(self, x, key=None):  # [batch, rows, encoder's width]
        return self.linear(self.layer(x, key))


@ADAPTERS.row("concat")
class ConcatAdapter(nnx.Module):
    """Concatenation of the features of two encoders (arXiv 2404.06212, section 3.1).

    Each encoder's features pass through a linear map of their own; joined into one sequence, they pass
    through a transformer layer and another linear map.
    """

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(LayerSettings):
        kind: str = "concat"
        width: int | None = None  # common width of both encoders' features; None: the first encoder's

        def validate(self, stream, width):
            super().validate(stream, width)
            divides(self.heads, self.width or stream.encoders[0].width)

    encoders = 2

    @staticmethod
    def rows(c: StreamConfig) -> int:
        return sum(encoder.rows for encoder in c.encoders)

    @staticmethod
    def side(c: StreamConfig) -> None:
        return None

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        init = INITS[c.adapter.init].linear
        inner = c.adapter.width or c.encoders[0].width
        self.projections = nnx.List([Linear(e.width, inner, init=init, rngs=rngs) for e in c.encoders])
        self.layer = TransformerLayer(c.adapter, inner, rngs=rngs)
        self.linear = Linear(inner, width, init=init, rngs=rngs)

    def read(self, encoders, media, remat="none"):
        return tuple(encoder(x, remat) for encoder, x in zip(encoders, media, strict=True))

    def __call__(self, features, key=None):
        parts = [project(x) for project, x in zip(self.projections, features, strict=True)]
        return self.linear(self.layer(jnp.concatenate(parts, axis=1), key))


def divides(heads: int, width: int):
    """Raises ConfigError unless `heads` divides the adapter's `width`."""
    check(heads > 0, f"adapter.heads is {heads}; there must be one at least")
    check(width % heads == 0, f"the adapter's width {width} is not a multiple of adapter.heads {heads}")
