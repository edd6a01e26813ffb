"""The Mistral decoder (arXiv 2310.06825): grouped-query attention, rotary positions, RMSNorm, SwiGLU, sliding window."""

import jax
import jax.numpy as jnp

from omnifusion_jax.config import DecoderConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import AttentionSpec, attend
from omnifusion_jax.nn.init import dense
from omnifusion_jax.nn.norms import RMSNorm
from omnifusion_jax.nn.rotary import rotary
from omnifusion_jax.nn.stack import run_stack
from omnifusion_jax.sharding import constrain


class Attention(nnx.Module):
    """Grouped-query self-attention.

    Kernels keep their dimensions apart (`[embed, kv_heads, group, head_dim]`), so that a sharding rule can name each
    of them and no reshape hides one.
    """

    def __init__(self, c: DecoderConfig, *, rngs):
        self.theta = c.rope_theta
        self.query = dense(rngs, c.embed, c.kv_heads, c.group, c.head_dim, fan_in=c.embed)
        self.key = dense(rngs, c.embed, c.kv_heads, c.head_dim, fan_in=c.embed)
        self.value = dense(rngs, c.embed, c.kv_heads, c.head_dim, fan_in=c.embed)
        self.out = dense(rngs, c.kv_heads, c.group, c.head_dim, c.embed, fan_in=c.heads * c.head_dim)

    def __call__(self, x, spec, mask, cache=None, at=0):
        """x [batch, seq, embed]; `cache` a pair [batch, kv_heads, length, head_dim] that is written from index `at` on. Returns (y, cache)."""
        q = rotary(jnp.einsum("btd,dkgh->bkgth", x, self.query[...]), spec.query_positions, self.theta)
        k = rotary(jnp.einsum("bsd,dkh->bksh", x, self.key[...]), spec.query_positions, self.theta)
        v = jnp.einsum("bsd,dkh->bksh", x, self.value[...])
        if cache is not None:
            k, v = cache = tuple(jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=2) for old, new in zip(cache, (k, v), strict=True))
        return jnp.einsum("bkgth,kghd->btd", attend(q, k, v, mask), self.out[...]), cache


class Block(nnx.Module):
    def __init__(self, c: DecoderConfig, *, rngs):
        self.norm1, self.norm2 = RMSNorm(c.embed, c.eps), RMSNorm(c.embed, c.eps)
        self.attention = Attention(c, rngs=rngs)
        self.gate = dense(rngs, c.embed, c.mlp, fan_in=c.embed)
        self.up = dense(rngs, c.embed, c.mlp, fan_in=c.embed)
        self.down = dense(rngs, c.mlp, c.embed, fan_in=c.mlp)

    def __call__(self, x, spec, mask, cache=None, at=0):
        x = constrain(x, "batch", None, None)
        y, cache = self.attention(self.norm1(x), spec, mask, cache, at)
        x = x + y
        y = self.norm2(x)
        return x + (jax.nn.silu(y @ self.gate[...]) * (y @ self.up[...])) @ self.down[...], cache


class Decoder(nnx.Module):
    """Token embeddings [batch, seq, embed] to hidden states; `logits` turns those into scores over the vocabulary."""

    def __init__(self, c: DecoderConfig, *, rngs):
        self.config = c
        self.embed = dense(rngs, c.vocab, c.embed, fan_in=c.embed)
        self.layers = nnx.stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.norm = RMSNorm(c.embed, c.eps)
        self.head = dense(rngs, c.embed, c.vocab, fan_in=c.embed)

    def __call__(self, x, spec: AttentionSpec, cache=None, at=0, remat="none"):
        """Hidden states after the last norm, and the cache with the new keys and values written from index `at` on.

        `cache` is a list of one (key, value) pair a layer, for the list form of the stack, or None. With a cache, `spec` describes its whole length
        on the key side.
        """
        mask = spec.dense()
        x, cache = run_stack(self.layers, x, lambda layer, x, kv: layer(x, spec, mask, kv, at), cache, remat)
        return self.norm(x), cache

    def logits(self, x):
        """[..., embed] to float32[..., vocab]."""
        return jnp.einsum("...d,dv->...v", x, self.head[...], preferred_element_type=jnp.float32)
