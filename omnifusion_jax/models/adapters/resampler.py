"""Trained queries that read the features of one encoder, as in OmniLMM and MiniCPM-V."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.config import AdapterConfig, StreamConfig, check
from omnifusion_jax.models.adapters.base import OfOneEncoder
from omnifusion_jax.models.adapters.transformer import divides
from omnifusion_jax.models.grids import Grids
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import EVERYTHING
from omnifusion_jax.nn.attention import Attention
from omnifusion_jax.nn.init import INITS, dense
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.nn.norms import LayerNorm
from omnifusion_jax.nn.resize import resize_rows
from omnifusion_jax.tables import ADAPTERS


@ADAPTERS.row("resampler")
class ResamplerAdapter(OfOneEncoder, nnx.Module):
    """One layer of cross-attention from trained queries to the features of one encoder.

    Queries and keys get fixed position embeddings: sines and cosines of column and row, for queries on their
    own grid. For keys they are those of the queries, resized to the grid of features, or "adaptive", sines
    and cosines on the grid of features. Values get none.
    """

    @dataclasses.dataclass(unsafe_hash=True)
    class Settings(AdapterConfig):
        kind: str = "resampler"
        queries: int = 64  # rows that come out: those of a square grid
        heads: int = 32  # of attention
        # keys have positions of their own grid, of whatever shape; false: those of the queries, resized
        adaptive: bool = False
        eps: float = 1e-6  # of norms

        def validate(self, stream, width):
            super().validate(stream, width)
            divides(self.heads, width)
            square = self.queries > 0 and math.isqrt(self.queries) ** 2 == self.queries
            check(square, f"adapter.queries {self.queries} make no square grid")
            fits = width % 4 == 0  # sines and cosines, of columns and rows
            check(fits, f"adapter.kind 'resampler' needs a decoder.width that 4 divides, not {width}")
            check(
                self.adaptive or not stream.encoders[0].budget,
                "adapter.kind 'resampler' needs adapter.adaptive for pictures of any shape (encoder.budget)",
            )
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
        self.grid, self.encoder, self.adaptive = self.side(c), c.encoders[0], a.adaptive
        self.queries = dense(rngs, a.queries, width, fan_in=width)
        to_width = lambda ins: Linear(ins, width, bias=False, init=init.linear, rngs=rngs)
        self.projection = to_width(inner) if inner != width else None
        self.query_norm, self.feature_norm, self.norm = (LayerNorm(width, a.eps) for _ in range(3))
        self.attention = Attention(width, a.heads, init=init, rngs=rngs)
        self.linear = to_width(width)

    def read(self, encoders, media, remat="none"):
        """The features, and the grids of pictures of any shape; None where all are squares."""
        return encoders[0](media[0], remat), Grids.of(media[0]) if self.encoder.budget else None

    def __call__(self, features, key=None):  # [batch, rows, encoder's width]
        x, grids = features
        x = self.feature_norm(x if self.projection is None else self.projection(x))
        queries = self.query_norm(self.queries[...])
        places = square(self.grid, queries.shape[-1])  # [queries, width]
        keys = x + self.key_places(places, grids).astype(x.dtype)
        queries = queries + places.astype(queries.dtype)
        spec = EVERYTHING if grids is None else grids.seen_by(len(queries))
        y, _ = self.attention(queries[None], spec, context=keys, values=x)
        return self.linear(self.norm(y))

    def key_places(self, places, grids):
        """Position embeddings of the keys, [rows, width] or [batch, rows, width], from those of queries."""
        if grids is not None:
            return sines(grids.row, grids.column, places.shape[-1], jnp)
        if self.adaptive:
            return square(self.encoder.side, places.shape[-1])
        return resize_rows(jnp.array(places)[None], self.encoder.rows, "bicubic")[0]


def square(side: int, width: int) -> np.ndarray:
    """Position embeddings of a square grid, float32[side * side, width]."""
    at = np.arange(side)
    return sines(np.repeat(at, side), np.tile(at, side), width)


def sines(row, column, width: int, xp=np):
    """Position embeddings float32[..., width] of places, int[...] each.

    The first half of the channels encodes the column, the second the row. Each half holds sines and then
    cosines of position * 10000 ** -(i / n), for i < n = width // 4. All is computed in float32, as in the
    original, whose checkpoints hold the result.
    """
    n = width // 4
    speeds = 1 / np.float32(10000) ** (np.arange(n, dtype=np.float32) / np.float32(n))
    steps = (at[..., None].astype(np.float32) * speeds for at in (column, row))
    return xp.concatenate([f(step) for step in steps for f in (xp.sin, xp.cos)], axis=-1)
