"""Trained queries that read the features of one encoder, as in OmniLMM and MiniCPM-V."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.config import AdapterConfig, StreamConfig, check
from omnifusion_jax.models.adapters.base import OfOneEncoder
from omnifusion_jax.models.adapters.transformer import divides
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import Attention
from omnifusion_jax.nn.init import INITS, dense
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.nn.norms import LayerNorm
from omnifusion_jax.nn.resize import resize_rows
from omnifusion_jax.tables import ADAPTERS


@ADAPTERS.row("resampler")
class ResamplerAdapter(OfOneEncoder, nnx.Module):
    """One layer of cross-attention from trained queries to the features of one encoder.

    Queries and keys get fixed position embeddings: sines and cosines of column and row on the grid of
    queries, resized to the grid of features for the keys. Values get none.
    """

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(AdapterConfig):
        kind: str = "resampler"
        queries: int = 64  # rows that come out: those of a square grid
        heads: int = 32  # of attention
        eps: float = 1e-6  # of norms

        def validate(self, stream, width):
            super().validate(stream, width)
            divides(self.heads, width)
            square = self.queries > 0 and math.isqrt(self.queries) ** 2 == self.queries
            check(square, f"adapter.queries {self.queries} make no square grid")
            fits = width % 4 == 0  # sines and cosines, of columns and rows
            check(fits, f"adapter.kind 'resampler' needs a decoder.width that 4 divides, not {width}")
            check(
                not stream.encoders[0].keep_class_token,
                "adapter.kind 'resampler': encoder.keep_class_token has no place in the grid",
            )

    @staticmethod
    def rows(c: StreamConfig) -> int:
        return c.adapter.queries

    @staticmethod
    def side(c: StreamConfig) -> int:
        return math.isqrt(c.adapter.queries)

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        a, inner, init = c.adapter, c.encoders[0].width, INITS[c.adapter.init]
        self.grid = self.side(c)
        self.queries = dense(rngs, a.queries, width, fan_in=width)
        to_width = lambda ins: Linear(ins, width, bias=False, init=init.linear, rngs=rngs)
        self.projection = to_width(inner) if inner != width else None
        self.query_norm, self.feature_norm, self.norm = (LayerNorm(width, a.eps) for _ in range(3))
        self.attention = Attention(width, a.heads, init=init, rngs=rngs)
        self.linear = to_width(width)

    def __call__(self, x, key=None):  # [batch, rows, encoder's width]
        x = self.feature_norm(x if self.projection is None else self.projection(x))
        queries = self.query_norm(self.queries[...])
        places = jnp.array(sines(self.grid, queries.shape[-1]))  # [queries, width]
        keys = x + resize_rows(places[None], x.shape[1], "bicubic")[0].astype(x.dtype)
        queries = queries + places.astype(queries.dtype)
        y, _ = self.attention(queries[None], context=keys, values=x)
        return self.linear(self.norm(y))


def sines(side: int, width: int) -> np.ndarray:
    """Position embeddings of a square grid, float32[side * side, width].

    The first half of the channels encodes the column, the second the row. Each half holds sines and then
    cosines of position * 10000 ** -(i / n), for i < n = width // 4.
    """
    steps = np.arange(side)[:, None] * 10000 ** -(np.arange(width // 4) / (width // 4))
    one = np.concatenate([np.sin(steps), np.cos(steps)], axis=1)  # [side, width / 2]
    return np.concatenate([np.tile(one, (side, 1)), np.repeat(one, side, axis=0)], axis=1).astype(np.float32)
