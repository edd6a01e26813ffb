"""What turns encoder features into token embeddings."""

import jax
import jax.numpy as jnp

from omnifusion_jax.config import AdapterConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import dense, zeros
from omnifusion_jax.nn.norms import LayerNorm


def drop(x, rate, key):
    """Inverted dropout; none without a key."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


class TransformerAdapter(nnx.Module):
    """One encoder layer of `torch.nn.TransformerEncoderLayer` (post-norm, ReLU, no position of its own), then a linear map.

    Dropout falls where PyTorch has it: on attention probabilities, after attention, inside and after the feed-forward part.
    """

    def __init__(self, c: AdapterConfig, width, out, *, rngs):
        self.config = c
        size = width // c.heads
        self.qkv, self.qkv_bias = dense(rngs, width, 3, c.heads, size, fan_in=width), zeros(3, c.heads, size)
        self.out, self.out_bias = dense(rngs, c.heads, size, width, fan_in=width), zeros(width)
        self.norm1, self.norm2 = LayerNorm(width, c.eps), LayerNorm(width, c.eps)
        self.up, self.up_bias = dense(rngs, width, c.mlp, fan_in=width), zeros(c.mlp)
        self.down, self.down_bias = dense(rngs, c.mlp, width, fan_in=c.mlp), zeros(width)
        self.linear, self.linear_bias = dense(rngs, width, out, fan_in=width), zeros(out)

    def attention(self, x, key):  # [batch, rows, width]
        q, k, v = jnp.einsum("btd,dnkh->nbkth", x, self.qkv[...]) + self.qkv_bias[...][:, None, :, None]
        scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        probabilities = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype), self.config.dropout, key)
        y = jnp.einsum("bkts,bksh->bkth", probabilities, v)
        return jnp.einsum("bkth,khd->btd", y, self.out[...]) + self.out_bias[...]

    def __call__(self, x, key=None):
        """Features [batch, rows, width] to embeddings [batch, rows, out]. `key` turns dropout on."""
        keys = [None] * 4 if key is None else jax.random.split(key, 4)
        rate = self.config.dropout
        x = self.norm1(x + drop(self.attention(x, keys[0]), rate, keys[1]))
        hidden = drop(jax.nn.relu(x @ self.up[...] + self.up_bias[...]), rate, keys[2])
        x = self.norm2(x + drop(hidden @ self.down[...] + self.down_bias[...], rate, keys[3]))
        return x @ self.linear[...] + self.linear_bias[...]
