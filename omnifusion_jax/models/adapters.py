"""What turns encoder features into token embeddings.

An adapter has two steps: `read(encoders, images)` takes from the encoders what it needs, and calling it on that gives
embeddings [batch, rows, out]. `images` holds one array for each encoder. A `key` turns dropout on. Fresh parameters are
drawn by the row of `INITS` that `adapter.init` names.
"""

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.config import ModelConfig
from omnifusion_jax.models.mix import Mix
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import Attention
from omnifusion_jax.nn.dropout import drop
from omnifusion_jax.nn.feed_forward import ACTIVATIONS, FeedForward
from omnifusion_jax.nn.init import INITS, dense
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.nn.norms import LayerNorm
from omnifusion_jax.nn.resize import resize_matrix
from omnifusion_jax.tables import ADAPTERS


def read_first(adapter, encoders, images):
    """Features of the one encoder."""
    return encoders[0](images[0])


@ADAPTERS.row("linear")
class LinearAdapter(nnx.Module):
    """One linear map."""

    def __init__(self, c: ModelConfig, *, rngs):
        self.linear = Linear(c.encoder.embed, c.decoder.embed, init=INITS[c.adapter.init].linear, rngs=rngs)

    read = read_first

    def __call__(self, x, key=None):
        return self.linear(x)


@ADAPTERS.row("mlp")
class MlpAdapter(nnx.Module):
    """Two layers with a GELU between, as in LLaVA-1.5 (arXiv 2310.03744)."""

    def __init__(self, c: ModelConfig, *, rngs):
        init, hidden = INITS[c.adapter.init].linear, c.adapter.mlp
        self.activation = c.adapter.activation
        self.up = Linear(c.encoder.embed, hidden, init=init, rngs=rngs)
        self.linear = Linear(hidden, c.decoder.embed, init=init, rngs=rngs)

    read = read_first

    def __call__(self, x, key=None):
        return self.linear(ACTIVATIONS[self.activation](self.up(x)))


class TransformerLayer(nnx.Module):
    """`torch.nn.TransformerEncoderLayer`: post-norm, ReLU, no position of its own.

    Dropout falls where PyTorch has it: on attention probabilities, after attention, inside and after the feed-forward part.
    """

    def __init__(self, c: ModelConfig, width, *, rngs):
        a, init = c.adapter, INITS[c.adapter.init]
        self.dropout = a.dropout
        self.attention = Attention(width, a.heads, init=init, rngs=rngs)
        self.norm1, self.norm2 = LayerNorm(width, a.eps), LayerNorm(width, a.eps)
        self.feed_forward = FeedForward(width, a.mlp, "relu", init=init.linear, rngs=rngs)

    def __call__(self, x, key=None):  # [batch, rows, width]
        rate, keys = self.dropout, [None] * 4 if key is None else jax.random.split(key, 4)
        x = self.norm1(x + drop(self.attention(x, dropout=(rate, keys[0]))[0], rate, keys[1]))
        return self.norm2(x + drop(self.feed_forward(x, rate, keys[2]), rate, keys[3]))


@ADAPTERS.row("transformer")
class TransformerAdapter(nnx.Module):
    """One transformer layer, then a linear map: the adapter of OmniFusion."""

    def __init__(self, c: ModelConfig, *, rngs):
        width = c.encoder.embed
        self.layer = TransformerLayer(c, width, rngs=rngs)
        self.linear = Linear(width, c.decoder.embed, init=INITS[c.adapter.init].linear, rngs=rngs)

    read = read_first

    def __call__(self, x, key=None):
        return self.linear(self.layer(x, key))


@ADAPTERS.row("concat")
class ConcatAdapter(nnx.Module):
    """Features of both encoders through a linear map each, then as one sequence through a transformer layer and a linear map."""

    def __init__(self, c: ModelConfig, *, rngs):
        init, width = INITS[c.adapter.init].linear, c.adapter.width or c.encoder.embed
        self.projections = nnx.List([Linear(e.embed, width, init=init, rngs=rngs) for e in c.encoders])
        self.layer = TransformerLayer(c, width, rngs=rngs)
        self.linear = Linear(width, c.decoder.embed, init=init, rngs=rngs)

    def read(self, encoders, images):
        return tuple(encoder(x) for encoder, x in zip(encoders, images, strict=True))

    def __call__(self, features, key=None):
        parts = [project(x) for project, x in zip(self.projections, features, strict=True)]
        return self.linear(self.layer(jnp.concatenate(parts, axis=1), key))


def mixes(c: ModelConfig, width, rngs):
    return nnx.List([Mix(e, c.adapter, width, rngs=rngs) for e in c.encoders])


def read_mixes(adapter, encoders, images):
    """Of each encoder the mix of its layers."""
    return tuple(mix(encoder, x) for mix, encoder, x in zip(adapter.mixes, encoders, images, strict=True))


@ADAPTERS.row("sum")
class SumAdapter(nnx.Module):
    """Projection and summation, the adapter of the published two-encoder model: a `Mix` of each encoder's layers, added up, GELU, a linear map."""

    def __init__(self, c: ModelConfig, *, rngs):
        width = c.adapter.width or c.encoder.embed
        self.rows, self.align, self.activation = max(e.rows for e in c.encoders), c.adapter.align, c.adapter.activation
        self.mixes = mixes(c, width, rngs)
        self.linear = Linear(width, c.decoder.embed, init=INITS[c.adapter.init].linear, rngs=rngs)

    read = read_mixes

    def __call__(self, mixed, key=None):
        return self.linear(ACTIVATIONS[self.activation](sum(ALIGN[self.align](x, self.rows) for x in mixed)))


def pad(x, rows):
    """[batch, fewer, width] to [batch, rows, width], with zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)))


def interpolate(x, rows, how="bilinear"):
    """[batch, fewer or more, width] to [batch, rows, width] by resampling the square grid."""
    old, new = (round(n**0.5) for n in (x.shape[1], rows))
    if old == new:
        return x
    matrix, grid = jnp.array(resize_matrix(old, new, how), x.dtype), x.reshape(len(x), old, old, -1)
    return jnp.einsum("ip,jq,bpqd->bijd", matrix, matrix, grid).reshape(len(x), rows, -1)


ALIGN = {"pad": pad, "interpolate": interpolate}


@ADAPTERS.row("attention")
class AttentionAdapter(nnx.Module):
    """Projection and multi-head attention: a `Mix` of each encoder's layers, GELU on each, one sequence of both; trained queries read it."""

    def __init__(self, c: ModelConfig, *, rngs):
        a, width, init = c.adapter, c.adapter.width or c.encoder.embed, INITS[c.adapter.init]
        self.activation = a.activation
        self.mixes = mixes(c, width, rngs)
        self.queries = dense(rngs, a.queries, width, fan_in=width)  # PyTorch has no default
        self.attention = Attention(width, a.heads, init=init, rngs=rngs)
        self.linear = Linear(width, c.decoder.embed, init=init.linear, rngs=rngs)

    read = read_mixes

    def __call__(self, mixed, key=None):
        activate = ACTIVATIONS[self.activation]
        x = jnp.concatenate([activate(part) for part in mixed], axis=1)
        y, _ = self.attention(self.queries[...][None], context=x)
        return self.linear(activate(y))


@ADAPTERS.row("resampler")
class ResamplerAdapter(nnx.Module):
    """Trained queries on a square grid read the features of one encoder by cross-attention, as in OmniLMM and MiniCPM-V.

    Queries and keys get fixed positions, sines and cosines of their column and row on the queries' grid; the features'
    grid is fitted to it. Values get none.
    """

    def __init__(self, c: ModelConfig, *, rngs):
        a, width, init = c.adapter, c.decoder.embed, INITS[c.adapter.init]
        self.side = round(a.queries**0.5)
        self.queries = dense(rngs, a.queries, width, fan_in=width)
        self.projection = Linear(c.encoder.embed, width, bias=False, init=init.linear, rngs=rngs) if c.encoder.embed != width else None
        self.query_norm, self.feature_norm, self.norm = (LayerNorm(width, a.eps) for _ in range(3))
        self.attention = Attention(width, a.heads, init=init, rngs=rngs)
        self.linear = Linear(width, width, bias=False, init=init.linear, rngs=rngs)

    read = read_first

    def __call__(self, x, key=None):  # [batch, rows, encoder's width]
        x = self.feature_norm(x if self.projection is None else self.projection(x))
        queries = self.query_norm(self.queries[...])
        places = jnp.array(sines(self.side, queries.shape[-1]))  # [queries, width]
        keys = x + interpolate(places[None], x.shape[1], "bicubic")[0].astype(x.dtype)
        y, _ = self.attention((queries + places.astype(queries.dtype))[None], context=keys, values=x)
        return self.linear(self.norm(y))


def sines(side, width):
    """Positions of a square grid, float32[side * side, width]: half of the channels for the column, half for the row, each
    sines and then cosines of wavelengths up to 10000."""
    steps = np.arange(side)[:, None] * 10000 ** -(np.arange(width // 4) / (width // 4))
    one = np.concatenate([np.sin(steps), np.cos(steps)], axis=1)  # [side, width / 2]
    return np.concatenate([np.tile(one, (side, 1)), np.repeat(one, side, axis=0)], axis=1).astype(np.float32)
