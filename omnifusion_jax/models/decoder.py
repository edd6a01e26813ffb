"""One decoder for the Llama, Mistral and Qwen families.

It has grouped-query attention, rotary positions, RMSNorm and SwiGLU; fields of DecoderConfig say where the
families differ. Your own decoder is a row of `tables.DECODERS`; `contracts.Decoder` says what it offers.
"""

import jax.numpy as jnp

from omnifusion_jax.config import DecoderConfig
from omnifusion_jax.nn import nnx, quantized
from omnifusion_jax.nn.attend import AttentionSpec
from omnifusion_jax.nn.attention import Attention
from omnifusion_jax.nn.feed_forward import FeedForward
from omnifusion_jax.nn.init import dense
from omnifusion_jax.nn.kept import nothing
from omnifusion_jax.nn.linear import product, product_turned
from omnifusion_jax.nn.norms import RMSNorm
from omnifusion_jax.nn.rotary import frequencies, over_text
from omnifusion_jax.nn.stack import run_stack
from omnifusion_jax.sharding import constrain
from omnifusion_jax.tables import DECODERS


class Block(nnx.Module):
    """Attention and a feed-forward part, each after an RMSNorm and added to the residual stream."""

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        self.scale = c.residual_scale
        self.norm1, self.norm2 = RMSNorm(c.width, c.eps), RMSNorm(c.width, c.eps)
        bias = ("query", "key", "value") if c.qkv_bias else ()
        norm = (lambda: RMSNorm(c.head_dim, c.eps)) if c.qk_norm else None
        self.attention = Attention(c.width, c.heads, c.head_dim, c.kv_heads, bias, norm, rngs=rngs)
        self.feed_forward = FeedForward(c.width, c.mlp, "swiglu", bias=False, rngs=rngs)

    def __call__(self, x, spec, turn, cache=None, at=None):  # [batch, seq, width]
        x = constrain(x, "batch", "seq", None)
        y, cache = self.attention(self.norm1(x), spec, turn=turn, cache=cache, at=at)
        x = constrain(x + scaled(y, self.scale), "batch", "seq", None)
        return x + scaled(self.feed_forward(self.norm2(x)), self.scale), cache


def scaled(x, factor):
    return x if factor == 1 else x * factor


class Decoder(nnx.Module):
    """Turns token embeddings [batch, seq, width] into hidden states, and `logits` those into scores.

    A tied head is the embedding table itself: one array, with one gradient. For answers both may be integers,
    with a scale for each token beside them.
    """

    embed_scale = head_scale = None  # [vocab, 1], [1, vocab]

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.embed = dense(rngs, c.vocab, c.width, fan_in=c.width)
        self.layers = nnx.stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.norm = RMSNorm(c.width, c.eps)
        self.head = None if c.tied else dense(rngs, c.width, c.vocab, fan_in=c.width)

    @property
    def dtype(self):
        """The dtype of the computation; the embedding table may be kept in another one."""
        return self.norm.scale[...].dtype

    def embed_tokens(self, tokens):
        """Token ids int32[...] to their embeddings [..., width]."""
        x = self.embed[...][tokens]
        if self.embed_scale is not None:
            x = quantized.values(x, self.embed_scale[...][tokens])
        return scaled(x.astype(self.dtype), self.config.embed_scale)

    def __call__(self, x, spec: AttentionSpec, cache=None, at=None, remat="none"):
        """Hidden states [batch, seq, width] after the last norm, and the cache with the new keys and values.

        Args:
          x: embeddings [batch, seq, width].
          spec: what attends to what; with a cache, its key side describes the whole length of the cache.
          cache: what `init_cache` makes, for the list form of the stack; or None.
          at: int32[batch], the index of the cache from which row b's new keys and values are written.
          remat: a row of `nn.stack.REMAT`.
        """
        c = self.config
        frequency = frequencies(c.head_dim // 2, c.rope_theta, c.rope_scaling)
        turn = over_text(spec.query.positions, frequency, x.dtype)
        step = lambda layer, x, kv: layer(x, spec, turn, kv, at)
        x, cache = run_stack(self.layers, x, step, cache, remat)
        return self.norm(x), cache

    def init_cache(self, batch: int, length: int, dtype):
        """An empty cache for `length` positions, as a list with one (key, value) pair for each layer.

        Keys and values are [batch, kv_heads, length, head_dim], in the form that `nn.kept` has for `dtype`.
        """
        c = self.config
        empty = nothing((batch, c.kv_heads, length, c.head_dim), dtype)
        return [(empty, empty)] * c.layers

    def logits(self, x):
        """Hidden states [..., width] to scores float32[..., vocab]."""
        # The loss comes piece by piece: spread here, the gradient of each piece is, before they are added up.
        if self.head is None:
            head, scales, width = constrain(self.embed[...], "vocab", "width"), self.embed_scale, 1
        else:
            head, scales, width = constrain(self.head[...], "width", "vocab"), self.head_scale, 0
        if scales is None:
            found = (product_turned if width else product)(x, head, dtype=jnp.float32)
        else:
            found = quantized.product_by_output(x, head, scales[...], (width,), jnp.float32)
        return scaled(found, self.config.logit_scale)


DECODERS.update(dict.fromkeys(("mistral", "llama", "minicpm", "qwen2", "qwen3"), Decoder))
