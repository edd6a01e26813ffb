"""The vision transformer of CLIP (arXiv 2103.00020), read at any of its layers."""

import jax
import jax.numpy as jnp

from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import attend
from omnifusion_jax.nn.init import dense, zeros
from omnifusion_jax.nn.norms import LayerNorm
from omnifusion_jax.nn.stack import first_layers, run_stack
from omnifusion_jax.sharding import constrain

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class Attention(nnx.Module):
    """Full self-attention with biases. Kernels keep heads and head_dim apart."""

    def __init__(self, c: EncoderConfig, *, rngs):
        size = c.embed // c.heads
        self.query, self.query_bias = dense(rngs, c.embed, c.heads, size, fan_in=c.embed), zeros(c.heads, size)
        self.key, self.key_bias = dense(rngs, c.embed, c.heads, size, fan_in=c.embed), zeros(c.heads, size)
        self.value, self.value_bias = dense(rngs, c.embed, c.heads, size, fan_in=c.embed), zeros(c.heads, size)
        self.out, self.out_bias = dense(rngs, c.heads, size, c.embed, fan_in=c.embed), zeros(c.embed)

    def __call__(self, x):  # [batch, seq, embed]
        q = jnp.einsum("btd,dkh->bkth", x, self.query[...]) + self.query_bias[...][:, None]
        k = jnp.einsum("btd,dkh->bkth", x, self.key[...]) + self.key_bias[...][:, None]
        v = jnp.einsum("btd,dkh->bkth", x, self.value[...]) + self.value_bias[...][:, None]
        y = attend(q[:, :, None], k, v)[:, :, 0]  # [batch, heads, seq, head_dim]
        return jnp.einsum("bkth,khd->btd", y, self.out[...]) + self.out_bias[...]


class Block(nnx.Module):
    def __init__(self, c: EncoderConfig, *, rngs):
        self.norm1, self.norm2 = LayerNorm(c.embed, c.eps), LayerNorm(c.embed, c.eps)
        self.attention = Attention(c, rngs=rngs)
        self.up, self.up_bias = dense(rngs, c.embed, c.mlp, fan_in=c.embed), zeros(c.mlp)
        self.down, self.down_bias = dense(rngs, c.mlp, c.embed, fan_in=c.mlp), zeros(c.embed)
        self.activation = c.activation

    def __call__(self, x):
        x = constrain(x, "batch", None, None)
        x = x + self.attention(self.norm1(x))
        hidden = ACTIVATIONS[self.activation](self.norm2(x) @ self.up[...] + self.up_bias[...])
        return x + hidden @ self.down[...] + self.down_bias[...]


class VisionTransformer(nnx.Module):
    """Images to hidden states. Hidden state 0 is the input of the first block, i the output of block i.

    `post_norm` belongs to the checkpoint; features are read before it, as LLaVA and OmniFusion do.
    """

    def __init__(self, c: EncoderConfig, *, rngs):
        self.config = c
        self.patch = dense(rngs, c.patch, c.patch, 3, c.embed, fan_in=3 * c.patch**2)
        self.class_token = dense(rngs, c.embed, fan_in=c.embed)
        self.position = dense(rngs, 1 + c.patches, c.embed, fan_in=c.embed)
        self.pre_norm = LayerNorm(c.embed, c.eps)
        self.layers = nnx.stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.post_norm = LayerNorm(c.embed, c.eps)

    def embed(self, images):
        """uint8[batch, size, size, 3] to hidden state 0, [batch, 1 + patches, embed]. Normalised here: a quarter of the transfer of floats."""
        c = self.config
        pixels = (images.astype(jnp.float32) / 255 - jnp.array(c.mean)) / jnp.array(c.std)
        side = c.image_size // c.patch
        patches = pixels.reshape(-1, side, c.patch, side, c.patch, 3).astype(self.patch[...].dtype)
        x = jnp.einsum("bipjqc,pqcd->bijd", patches, self.patch[...]).reshape(len(images), side * side, -1)
        cls = jnp.broadcast_to(self.class_token[...], (len(images), 1, c.embed))
        return self.pre_norm(jnp.concatenate([cls, x], axis=1) + self.position[...])

    def hidden_states(self, images):
        """All layers + 1 of them, [layers + 1, batch, 1 + patches, embed]."""
        x = self.embed(images)
        _, ys = run_stack(self.layers, x, lambda layer, x, _: (layer(x),) * 2)
        return jnp.concatenate([x[None], jnp.stack(ys) if isinstance(ys, list) else ys])

    def __call__(self, images):
        """uint8[batch, size, size, 3] to features [batch, rows, embed] of the configured layer; blocks above it do not run."""
        c = self.config
        depth = c.feature_layer if c.feature_layer >= 0 else c.layers + 1 + c.feature_layer
        stack = self.layers if depth == c.layers else first_layers(self.layers, depth)
        x, _ = run_stack(stack, self.embed(images), lambda layer, x, _: (layer(x), None))
        return x if c.keep_class_token else x[:, 1:]
