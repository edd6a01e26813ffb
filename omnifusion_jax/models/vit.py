"""The vision transformer of CLIP (arXiv 2103.00020), SigLIP (2303.15343), DINOv2 (2304.07193) and InternViT (2312.14238), read at any layer."""

import jax
import jax.numpy as jnp

from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import attend
from omnifusion_jax.nn.init import dense, ones, zeros
from omnifusion_jax.nn.norms import LayerNorm, RMSNorm
from omnifusion_jax.nn.resize import resize_matrix
from omnifusion_jax.nn.stack import first_layers, last_layers, run_stack
from omnifusion_jax.sharding import constrain

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
NORMS = {"layer": LayerNorm, "rms": RMSNorm}


class HeadsNorm(nnx.Module):
    """RMS norm over all heads at once."""

    def __init__(self, heads, size, eps):
        self.scale, self.eps = ones(heads, size), eps

    def __call__(self, x):  # [batch, heads, seq, head_dim]
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...][:, None]


class Attention(nnx.Module):
    """Full self-attention. Kernels keep heads and head_dim apart."""

    def __init__(self, c: EncoderConfig, *, rngs):
        size = c.embed // c.heads
        self.query, self.key, self.value = (dense(rngs, c.embed, c.heads, size, fan_in=c.embed) for _ in range(3))
        self.query_bias, self.key_bias, self.value_bias = (zeros(c.heads, size) if c.qkv_bias else None for _ in range(3))
        self.query_norm, self.key_norm = (HeadsNorm(c.heads, size, c.eps) if c.qk_norm else None for _ in range(2))
        self.out, self.out_bias = dense(rngs, c.heads, size, c.embed, fan_in=c.embed), zeros(c.embed)

    def __call__(self, x):  # [batch, seq, embed]
        q = heads(x, self.query, self.query_bias, self.query_norm)
        k = heads(x, self.key, self.key_bias, self.key_norm)
        v = heads(x, self.value, self.value_bias)
        y = attend(q[:, :, None], k, v)[:, :, 0]  # [batch, heads, seq, head_dim]
        return jnp.einsum("bkth,khd->btd", y, self.out[...]) + self.out_bias[...]


def heads(x, kernel, bias, norm=None):
    y = jnp.einsum("btd,dkh->bkth", x, kernel[...])
    y = y if bias is None else y + bias[...][:, None]
    return y if norm is None else norm(y)


class FeedForward(nnx.Module):
    def __init__(self, c: EncoderConfig, *, rngs):
        self.activation = c.activation
        gated = c.activation == "swiglu"
        self.gate, self.gate_bias = (dense(rngs, c.embed, c.mlp, fan_in=c.embed), zeros(c.mlp)) if gated else (None, None)
        self.up, self.up_bias = dense(rngs, c.embed, c.mlp, fan_in=c.embed), zeros(c.mlp)
        self.down, self.down_bias = dense(rngs, c.mlp, c.embed, fan_in=c.mlp), zeros(c.embed)

    def __call__(self, x):  # [batch, seq, embed]
        y = x @ self.up[...] + self.up_bias[...]
        y = y * jax.nn.silu(x @ self.gate[...] + self.gate_bias[...]) if self.gate else ACTIVATIONS[self.activation](y)
        return y @ self.down[...] + self.down_bias[...]


class Block(FeedForward):
    def __init__(self, c: EncoderConfig, *, rngs):
        super().__init__(c, rngs=rngs)
        self.norm1, self.norm2 = NORMS[c.norm](c.embed, c.eps), NORMS[c.norm](c.embed, c.eps)
        self.attention = Attention(c, rngs=rngs)
        self.scale1, self.scale2 = (ones(c.embed) if c.layer_scale else None for _ in range(2))

    def __call__(self, x):
        x = constrain(x, "batch", None, None)
        x = x + scaled(self.attention(self.norm1(x)), self.scale1)
        return x + scaled(super().__call__(self.norm2(x)), self.scale2)


def scaled(x, scale):
    return x if scale is None else x * scale[...]


class VisionTransformer(nnx.Module):
    """Images to hidden states. Hidden state 0 is the input of the first block, i the output of block i."""

    def __init__(self, c: EncoderConfig, *, rngs):
        self.config = c
        self.patch = dense(rngs, c.patch, c.patch, 3, c.embed, fan_in=3 * c.patch**2)
        self.patch_bias = zeros(c.embed) if c.patch_bias else None
        self.class_token = dense(rngs, c.embed, fan_in=c.embed) if c.class_token else None
        self.registers = dense(rngs, c.registers, c.embed, fan_in=c.embed) if c.registers else None
        self.position = dense(rngs, c.positions, c.embed, fan_in=c.embed)
        self.pre_norm = NORMS[c.norm](c.embed, c.eps) if c.pre_norm else None
        self.layers = nnx.stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.post_norm = NORMS[c.norm](c.embed, c.eps) if c.post_norm else None

    def patches(self, images):
        """uint8[batch, size, size, 3] to [batch, patches, embed]. Normalised here: a quarter of the transfer of floats."""
        c = self.config
        pixels = (images.astype(jnp.float32) / 255 - jnp.array(c.mean)) / jnp.array(c.std)
        pixels = pixels[:, : c.side * c.patch, : c.side * c.patch]  # what is less than a patch is not seen
        pixels = pixels.reshape(-1, c.side, c.patch, c.side, c.patch, 3).astype(self.patch[...].dtype)
        x = jnp.einsum("bipjqc,pqcd->bijd", pixels, self.patch[...]).reshape(len(images), c.patches, -1)
        return x if self.patch_bias is None else x + self.patch_bias[...]

    def grid_positions(self):
        """[patches, embed], brought to the grid of this image size."""
        c, table = self.config, self.position[...][self.config.class_token :]
        if not c.resized:
            return table
        matrix = jnp.array(resize_matrix(c.position_grid, c.side, c.position_resize))
        grid = table.reshape(c.position_grid, c.position_grid, -1).astype(jnp.float32)
        return jnp.einsum("ip,jq,pqd->ijd", matrix, matrix, grid, precision="highest").reshape(c.patches, -1).astype(table.dtype)

    def embed(self, images):
        """uint8[batch, size, size, 3] to hidden state 0, [batch, seq, embed]: the class token, the registers, the patches."""
        c = self.config
        x = self.patches(images) + self.grid_positions()
        first = [self.class_token[...][None] + self.position[...][:1]] if c.class_token else []
        first += [self.registers[...]] if c.registers else []
        if first:
            first = jnp.concatenate(first)
            x = jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape)).astype(x.dtype), x], axis=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def features(self, state):
        """The rows of a hidden state that are handed on, [batch, rows, embed]."""
        c = self.config
        patches = state[:, c.class_token + c.registers :]
        return jnp.concatenate([state[:, :1], patches], axis=1) if c.keep_class_token else patches

    def fold(self, images, each, start, items=None, skip=0):
        """Threads `start` through the hidden states from number `skip` on, as they come up: `acc, y = each(acc, state, items[i])`.

        Returns the last `acc`, and the ys stacked. `items` is a tree of arrays with a leading axis, one row a state. No state outlives its turn,
        unless `each` keeps it.
        """
        x, _ = run_stack(first_layers(self.layers, skip), self.embed(images), lambda layer, x, _: (layer(x), None))
        acc, first = each(start, x, jax.tree.map(lambda a: a[0], items))

        def step(layer, carry, item):
            x = layer(carry[0])
            acc, y = each(carry[1], x, item)
            return (x, acc), y

        (_, acc), ys = run_stack(last_layers(self.layers, skip), (x, acc), step, jax.tree.map(lambda a: a[1:], items))
        return acc, jax.tree.map(lambda y, rest: jnp.concatenate([y[None], rest]), first, ys)

    def hidden_states(self, images):
        """All layers + 1 of them, [layers + 1, batch, seq, embed]."""
        return self.fold(images, lambda acc, state, _: (acc, state), None)[1]

    def __call__(self, images):
        """uint8[batch, size, size, 3] to features [batch, rows, embed] of the configured layer; blocks above it do not run."""
        c = self.config
        depth = c.feature_layer if c.feature_layer >= 0 else c.layers + 1 + c.feature_layer
        x, _ = run_stack(first_layers(self.layers, depth), self.embed(images), lambda layer, x, _: (layer(x), None))
        return self.features(self.post_norm(x) if c.feature_norm else x)
