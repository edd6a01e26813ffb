"""Adapters of two encoders that read a trained combination of all layers of each (arXiv 2404.06212, section 3.1)."""

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
    """What both have."""

    width: int | None = None  # that both encoders are brought to; None: the first one's
    activation: str = "gelu"  # or gelu_tanh
    eps: float = 1e-5  # of norms
    bias: str = "layers"  # each linear map has its own; "one": their sum has; or "none"
    shared_norm: bool = True  # one layer norm an encoder, not one a layer
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
    """Reads a `Mix` of each of two encoders."""

    encoders = 2

    @staticmethod
    def side(c: StreamConfig):
        return None

    def read(self, encoders, media):
        return tuple(mix(encoder, x) for mix, encoder, x in zip(self.mixes, encoders, media, strict=True))


def mixes(c: StreamConfig, width, rngs):
    return nnx.List([Mix(e, c.adapter, width, rngs=rngs) for e in c.encoders])


@ADAPTERS.row("sum")
class SumAdapter(OfMixes, nnx.Module):
    """Projection and summation, the adapter of the published two-encoder model: a `Mix` of each encoder's layers, added
    up, GELU, a linear map."""

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(MixSettings):
        kind: str = "sum"
        align: str = "pad"  # the shorter sequence gets zeros at its end; "interpolate": its grid is brought to the longer one's

        def validate(self, stream, width):
            super().validate(stream, width)
            one_of("adapter.align", self.align, ALIGN)
            square = not any(encoder.keep_class_token for encoder in stream.encoders)
            check(
                self.align == "pad" or square,
                "adapter.align=interpolate: encoder.keep_class_token has no place in the grid",
            )

    @staticmethod
    def rows(c: StreamConfig):
        return max(encoder.rows for encoder in c.encoders)

    def __init__(self, c: StreamConfig, width, *, rngs):
        inner = c.adapter.width or c.encoders[0].width
        self.settings, self.longest = c.adapter, self.rows(c)
        self.mixes = mixes(c, inner, rngs)
        self.linear = Linear(inner, width, init=INITS[c.adapter.init].linear, rngs=rngs)

    def __call__(self, mixed, key=None):
        align, activate = ALIGN[self.settings.align], ACTIVATIONS[self.settings.activation]
        return self.linear(activate(sum(align(x, self.longest) for x in mixed)))


def pad(x, rows):
    """[batch, fewer, width] to [batch, rows, width], with zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)))


ALIGN = {"pad": pad, "interpolate": lambda x, rows: resize_rows(x, rows, "bilinear")}


@ADAPTERS.row("attention")
class AttentionAdapter(OfMixes, nnx.Module):
    """Projection and multi-head attention: a `Mix` of each encoder's layers, GELU on each, one sequence of both; trained
    queries read it."""

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(MixSettings):
        kind: str = "attention"
        heads: int = 4  # of attention
        queries: int = 576  # rows that come out

        def validate(self, stream, width):
            super().validate(stream, width)
            divides(self.heads, self.width or stream.encoders[0].width)

    @staticmethod
    def rows(c: StreamConfig):
        return c.adapter.queries

    def __init__(self, c: StreamConfig, width, *, rngs):
        a, inner, init = c.adapter, c.adapter.width or c.encoders[0].width, INITS[c.adapter.init]
        self.activation = a.activation
        self.mixes = mixes(c, inner, rngs)
        self.queries = dense(rngs, a.queries, inner, fan_in=inner)  # PyTorch has no default
        self.attention = Attention(inner, a.heads, init=init, rngs=rngs)
        self.linear = Linear(inner, width, init=init.linear, rngs=rngs)

    def __call__(self, mixed, key=None):
        activate = ACTIVATIONS[self.activation]
        x = jnp.concatenate([activate(part) for part in mixed], axis=1)
        y, _ = self.attention(self.queries[...][None], context=x)
        return self.linear(activate(y))
