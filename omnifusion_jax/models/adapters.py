"""What turns encoder features into token embeddings.

An adapter has two steps: `read(encoders, images)` takes from the encoders what it needs, and calling it on that gives embeddings [batch, rows, out].
`images` holds one array for each encoder. A `key` turns dropout on. Fresh parameters are drawn by the row of `INITS`
that `adapter.init` names.
"""

import jax
import jax.numpy as jnp

from omnifusion_jax.config import ModelConfig
from omnifusion_jax.models.mix import Mix
from omnifusion_jax.models.vit import ACTIVATIONS
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import attend
from omnifusion_jax.nn.init import INITS, dense, zeros
from omnifusion_jax.nn.norms import LayerNorm
from omnifusion_jax.nn.resize import resize_matrix


class LinearAdapter(nnx.Module):
    """One linear map."""

    def __init__(self, c: ModelConfig, *, rngs):
        init, width, out = INITS[c.adapter.init], c.encoder.embed, c.decoder.embed
        self.linear, self.linear_bias = init.kernel(rngs, width, out, fan_in=width), init.bias(rngs, out, fan_in=width)

    def read(self, encoders, images):
        return encoders[0](images[0])

    def activate(self, x):
        return ACTIVATIONS[self.activation](x)

    def __call__(self, x, key=None):
        return x @ self.linear[...] + self.linear_bias[...]


class MlpAdapter(LinearAdapter):
    """Two layers with a GELU between, as in LLaVA-1.5 (arXiv 2310.03744)."""

    def __init__(self, c: ModelConfig, *, rngs):
        init, width, hidden, out = INITS[c.adapter.init], c.encoder.embed, c.adapter.mlp, c.decoder.embed
        self.activation = c.adapter.activation
        self.up, self.up_bias = init.kernel(rngs, width, hidden, fan_in=width), init.bias(rngs, hidden, fan_in=width)
        self.linear, self.linear_bias = init.kernel(rngs, hidden, out, fan_in=hidden), init.bias(rngs, out, fan_in=hidden)

    def __call__(self, x, key=None):
        return super().__call__(self.activate(x @ self.up[...] + self.up_bias[...]))


def drop(x, rate, key):
    """Inverted dropout; none without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class TransformerAdapter(LinearAdapter):
    """One encoder layer of `torch.nn.TransformerEncoderLayer` (post-norm, ReLU, no position of its own), then a linear map.

    Dropout falls where PyTorch has it: on attention probabilities, after attention, inside and after the feed-forward part.
    """

    def __init__(self, c: ModelConfig, *, rngs):
        a, width, out = c.adapter, c.adapter.width or c.encoder.embed, c.decoder.embed
        self.dropout, size, init = a.dropout, width // a.heads, INITS[a.init]
        self.qkv, self.qkv_bias = init.qkv(rngs, width, 3, a.heads, size, fan_in=width), zeros(3, a.heads, size)
        self.out, self.out_bias = init.kernel(rngs, a.heads, size, width, fan_in=width), zeros(width)
        self.norm1, self.norm2 = LayerNorm(width, a.eps), LayerNorm(width, a.eps)
        self.up, self.up_bias = init.kernel(rngs, width, a.mlp, fan_in=width), init.bias(rngs, a.mlp, fan_in=width)
        self.down, self.down_bias = init.kernel(rngs, a.mlp, width, fan_in=a.mlp), init.bias(rngs, width, fan_in=a.mlp)
        self.linear, self.linear_bias = init.kernel(rngs, width, out, fan_in=width), init.bias(rngs, out, fan_in=width)

    def attention(self, x, key):  # [batch, rows, width]
        q, k, v = jnp.einsum("btd,dnkh->nbkth", x, self.qkv[...]) + self.qkv_bias[...][:, None, :, None]
        scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        probabilities = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype), self.dropout, key)
        y = jnp.einsum("bkts,bksh->bkth", probabilities, v)
        return jnp.einsum("bkth,khd->btd", y, self.out[...]) + self.out_bias[...]

    def __call__(self, x, key=None):
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        x = self.norm1(x + drop(self.attention(x, keys[0]), self.dropout, keys[1]))
        hidden = drop(jax.nn.relu(x @ self.up[...] + self.up_bias[...]), self.dropout, keys[2])
        x = self.norm2(x + drop(hidden @ self.down[...] + self.down_bias[...], self.dropout, keys[3]))
        return super().__call__(x)


class Projection(nnx.Module):
    def __init__(self, width, out, init, *, rngs):
        self.kernel, self.bias = init.kernel(rngs, width, out, fan_in=width), init.bias(rngs, out, fan_in=width)

    def __call__(self, x):
        return x @ self.kernel[...] + self.bias[...]


class ConcatAdapter(TransformerAdapter):
    """Features of both encoders through a linear map each, then as one sequence through a transformer layer and a linear map."""

    def __init__(self, c: ModelConfig, *, rngs):
        super().__init__(c, rngs=rngs)
        width, init = c.adapter.width or c.encoder.embed, INITS[c.adapter.init]
        self.projections = nnx.List([Projection(e.embed, width, init, rngs=rngs) for e in c.encoders])

    def read(self, encoders, images):
        return tuple(encoder(x) for encoder, x in zip(encoders, images, strict=True))

    def __call__(self, features, key=None):
        parts = [project(x) for project, x in zip(self.projections, features, strict=True)]
        return super().__call__(jnp.concatenate(parts, axis=1), key)


class SumAdapter(LinearAdapter):
    """Projection and summation, the adapter of the published two-encoder model: a `Mix` of each encoder's layers, added up, GELU, a linear map."""

    def __init__(self, c: ModelConfig, *, rngs):
        init, width, out = INITS[c.adapter.init], c.adapter.width or c.encoder.embed, c.decoder.embed
        self.rows, self.align, self.activation = max(e.rows for e in c.encoders), c.adapter.align, c.adapter.activation
        self.mixes = nnx.List([Mix(e, c.adapter, width, rngs=rngs) for e in c.encoders])
        self.linear, self.linear_bias = init.kernel(rngs, width, out, fan_in=width), init.bias(rngs, out, fan_in=width)

    def read(self, encoders, images):
        return tuple(mix(encoder, x) for mix, encoder, x in zip(self.mixes, encoders, images, strict=True))

    def __call__(self, mixed, key=None):
        return super().__call__(self.activate(sum(ALIGN[self.align](x, self.rows) for x in mixed)))


def pad(x, rows):
    """[batch, fewer, width] to [batch, rows, width], with zeros at the end."""
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)))


def interpolate(x, rows):
    """The same by resampling the square grid bilinearly."""
    old, new = (round(n**0.5) for n in (x.shape[1], rows))
    if old == new:
        return x
    matrix, grid = jnp.array(resize_matrix(old, new, "bilinear"), x.dtype), x.reshape(len(x), old, old, -1)
    return jnp.einsum("ip,jq,bpqd->bijd", matrix, matrix, grid).reshape(len(x), rows, -1)


ALIGN = {"pad": pad, "interpolate": interpolate}


class AttentionAdapter(SumAdapter):
    """Projection and multi-head attention: a `Mix` of each encoder's layers, GELU on each, one sequence of both; trained queries read it."""

    def __init__(self, c: ModelConfig, *, rngs):
        super().__init__(c, rngs=rngs)
        a, width = c.adapter, c.adapter.width or c.encoder.embed
        size, init = width // a.heads, INITS[a.init]
        self.queries = dense(rngs, a.queries, width, fan_in=width)  # PyTorch has no default
        self.query, self.key, self.value = (init.qkv(rngs, width, a.heads, size, fan_in=width) for _ in range(3))
        self.query_bias, self.key_bias, self.value_bias = (zeros(a.heads, size) for _ in range(3))
        self.out, self.out_bias = init.kernel(rngs, a.heads, size, width, fan_in=width), zeros(width)

    def __call__(self, mixed, key=None):
        x = jnp.concatenate([self.activate(part) for part in mixed], axis=1)
        q = jnp.einsum("td,dkh->kth", self.queries[...], self.query[...]) + self.query_bias[...][:, None]
        k = jnp.einsum("bsd,dkh->bksh", x, self.key[...]) + self.key_bias[...][:, None]
        v = jnp.einsum("bsd,dkh->bksh", x, self.value[...]) + self.value_bias[...][:, None]
        y = attend(jnp.broadcast_to(q, (len(x), *q.shape))[:, :, None], k, v)[:, :, 0]
        y = jnp.einsum("bkth,khd->btd", y, self.out[...]) + self.out_bias[...]
        return LinearAdapter.__call__(self, self.activate(y))


ADAPTERS = {
    "linear": LinearAdapter,
    "mlp": MlpAdapter,
    "transformer": TransformerAdapter,
    "concat": ConcatAdapter,
    "sum": SumAdapter,
    "attention": AttentionAdapter,
}
