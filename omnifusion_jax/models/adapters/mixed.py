"""Adapters for two encoders that read a trained combination of the hidden states of each.

They follow arXiv 2404.06212, section 3.1.
"""

import dataclasses

import jax.numpy as jnp

from omnifusion_jax.config import AdapterConfig, StreamConfig, check, one_of
from omnifusion_jax.models.adapters.mix import Mix
from omnifusion_jax.models.adapters.transformer import divides
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import Attention
from omnifusion_jax.nn.feed_forward import ACTIVATIONS
from omnifusion_jax.nn.init import INITS, dense
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.nn.resize import resize_rows
from omnifusion_jax.tables import ADAPTERS


@dataclasses.dataclass(unsafe_hash=True)
class MixSettings(AdapterConfig):
    """Settings that both adapters have."""

    width: int | None = None  # common width of both encoders' features; None: the first encoder's
    activation: str = "gelu"  # or gelu_tanh
    eps: float = 1e-5  # of norms
    bias: str = "layers"  # each linear map has its own bias; "one": only their sum has one; or "none"
    shared_norm: bool = True  # one layer norm for each encoder, not one for each layer
    first_state: int = 0  # the first hidden state of the combination; 0 is the input of the first block

    def validate(self, stream, width):
        super().validate(stream, width)
        one_of("adapter.activation", self.activation, ("gelu", "gelu_tanh"))
        one_of("adapter.bias", self.bias, ("layers", "one", "none"))
        for encoder in stream.encoders:
            check(
                0 <= self.first_state <= encoder.layers,
                f"adapter.first_state {self.first_state} is not in 0..{encoder.layers}",
            )


class OfMixes:
    """Reads a `Mix` of each of two encoders; the embeddings form no square grid."""

    encoders = 2

    @staticmethod
    def side(c: StreamConfig) -> None:
        return None

    def read(self, encoders, media, remat="none"):
        each = zip(self.mixes, encoders, media, strict=True)
        return tuple(mix(encoder, x, remat) for mix, encoder, x in each)


def mixes(c: StreamConfig, width: int, rngs: nnx.Rngs):
    """One `Mix` for each encoder, all with outputs of the same `width`."""
    return nnx.List([Mix(e, c.adapter, width, rngs=rngs) for e in c.encoders])


@ADAPTERS.row("sum")
class SumAdapter(OfMixes, nnx.Module):
    """Projection and summation, the adapter of the published two-encoder model.

    It adds up the `Mix` of each encoder and applies a GELU and a linear map.
    """

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(MixSettings):
        kind: str = "sum"
        # the shorter sequence gets zeros at its end; "interpolate": its grid is resized to the longer one's
        align: str = "pad"

        def validate(self, stream, width):
            super().validate(stream, width)
            one_of("adapter.align", self.align, ALIGN)
            square = not any(encoder.keep_class_token for encoder in stream.encoders)
            check(
                self.align == "pad" or square,
                "adapter.align=interpolate: encoder.keep_class_token has no place in the grid",
            )

    @staticmethod
    def rows(c: StreamConfig) -> int:
        return max(encoder.rows for encoder in c.encoders)

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        inner = c.adapter.width or c.encoders[0].width
        self.settings, self.longest = c.adapter, self.rows(c)
        self.mixes = mixes(c, inner, rngs)
        self.linear = Linear(inner, width, init=INITS[c.adapter.init].linear, rngs=rngs)

    def __call__(self, mixed, key=None):
        align, activate = ALIGN[self.settings.align], ACTIVATIONS[self.settings.activation]
        added = sum(align(x, self.longest) for x in mixed)  # [batch, rows, inner width]
        return self.linear(activate(added))


def pad(x, rows):
    """Lengthens [batch, fewer rows, width] to [batch, rows, width] with zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)))


ALIGN = {"pad": pad, "interpolate": lambda x, rows: resize_rows(x, rows, "bilinear")}


@ADAPTERS.row("attention")
class AttentionAdapter(OfMixes, nnx.Module):
    """Projection and multi-head attention.

    It takes the `Mix` of each encoder, applies a GELU and joins both into one sequence, to which trained
    queries attend.
    """

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(MixSettings):
        kind: str = "attention"
        heads: int = 4  # of attention
        queries: int = 576  # rows that come out

        def validate(self, stream, width):
            super().validate(stream, width)
            divides(self.heads, self.width or stream.encoders[0].width)
            check(self.queries > 0, f"adapter.queries is {self.queries}; there must be one at least")

    @staticmethod
    def rows(c: StreamConfig) -> int:
        return c.adapter.queries

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        a, init = c.adapter, INITS[c.adapter.init]
        inner = a.width or c.encoders[0].width
        self.activation = a.activation
        self.mixes = mixes(c, inner, rngs)
        # PyTorch has no default for free queries, so they are drawn like this whatever `init` is.
        self.queries = dense(rngs, a.queries, inner, fan_in=inner)
        self.attention = Attention(inner, a.heads, init=init, rngs=rngs)
        self.linear = Linear(inner, width, init=init.linear, rngs=rngs)

    def __call__(self, mixed, key=None):
        activate = ACTIVATIONS[self.activation]
        x = jnp.concatenate([activate(part) for part in mixed], axis=1)
        y, _ = self.attention(self.queries[...][None], context=x)
        return self.linear(activate(y))
