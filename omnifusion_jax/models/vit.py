"""One vision transformer for several families, whose features are read at any layer.

The families are CLIP (arXiv 2103.00020), SigLIP (2303.15343), DINOv2 (2304.07193), InternViT (2312.14238) and
EVA-02 (2303.11331).
"""

import jax
import jax.numpy as jnp

from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.models.grids import Grids
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import EVERYTHING
from omnifusion_jax.nn.attention import Attention
from omnifusion_jax.nn.feed_forward import FeedForward
from omnifusion_jax.nn.init import dense, ones
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.nn.norms import HeadsNorm, LayerNorm, RMSNorm
from omnifusion_jax.nn.resize import resize_matrix, sampled
from omnifusion_jax.nn.rotary import over_grid
from omnifusion_jax.nn.stack import first_layers, last_layers, run_stack
from omnifusion_jax.sharding import constrain
from omnifusion_jax.tables import ENCODERS

NORMS = {"layer": LayerNorm, "rms": RMSNorm}
# What a block adds to x, given a norm and the layer (attention or feed-forward part) that it belongs to
ORDERS = {"pre": lambda norm, layer, x: layer(norm(x)), "post": lambda norm, layer, x: norm(layer(x))}


class Block(nnx.Module):
    """Attention and a feed-forward part, each with a norm and added to the residual stream."""

    def __init__(self, c: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = c
        biases = {"query": c.qkv_bias, "key": c.qkv_bias and c.key_bias, "value": c.qkv_bias, "out": True}
        bias = [name for name, there in biases.items() if there]
        norm = (lambda: HeadsNorm(c.heads, c.width // c.heads, c.eps)) if c.qk_norm else None
        self.norm1, self.norm2 = NORMS[c.norm](c.width, c.eps), NORMS[c.norm](c.width, c.eps)
        self.attention = Attention(c.width, c.heads, bias=bias, norm=norm, rngs=rngs)
        self.feed_forward = FeedForward(c.width, c.mlp, c.activation, rngs=rngs)
        self.scale1, self.scale2 = (ones(c.width) if c.layer_scale else None for _ in range(2))

    def __call__(self, x, turn=None, spec=EVERYTHING):  # [batch, seq, width]
        x, order = constrain(x, "batch", None, None), ORDERS[self.config.norm_order]
        attention = lambda x: self.attention(x, spec, turn=turn)[0]
        x = x + scaled(order(self.norm1, attention, x), self.scale1)
        return x + scaled(order(self.norm2, self.feed_forward, x), self.scale2)


def scaled(x, scale):
    return x if scale is None else x * scale[...]


@ENCODERS.row("vit")
class VisionTransformer(nnx.Module):
    """Turns images into hidden states: 0 is the input of the first block, i the output of block i.

    Images are uint8[batch, size, size, 3]. With `budget`, they have any shape, and come as patches, see
    batch.PATCH: uint8[batch, budget, 3 * patch**2 + 1]. What other modules use of it is `contracts.Encoder`.
    """

    def __init__(self, c: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = c
        self.patch = Linear((c.patch, c.patch, 3), c.width, c.patch_bias, rngs=rngs)
        self.class_token = dense(rngs, c.width, fan_in=c.width) if c.class_token else None
        self.registers = dense(rngs, c.registers, c.width, fan_in=c.width) if c.registers else None
        self.position = dense(rngs, c.positions, c.width, fan_in=c.width)
        self.pre_norm = NORMS[c.norm](c.width, c.eps) if c.pre_norm else None
        self.layers = nnx.stacked(lambda rngs: Block(c, rngs=rngs), c.layers, rngs)
        self.post_norm = NORMS[c.norm](c.width, c.eps) if c.post_norm else None

    @property
    def dtype(self):
        return self.position[...].dtype  # kernels may be kept in another one

    def block(self, images):
        """The step of `run_stack` that runs one block: (block, x, anything) to (x, None)."""
        c, turn = self.config, None
        spec = Grids.of(images).seen_by() if c.budget else EVERYTHING
        if c.rope_theta:
            grid, first = (c.side, c.rope_grid or c.side), c.class_token + c.registers
            turn = over_grid(*grid, c.rope_theta, first, c.width // c.heads, self.dtype)
        return lambda layer, x, _=None: (layer(x, turn, spec), None)

    def patches(self, images):
        """Maps images to embeddings [batch, patches, width].

        Pixels are normalised here rather than before they are transferred, since uint8 takes a quarter of the
        bytes of float32.
        """
        c = self.config
        if c.budget:
            pixels = images[..., :-1].reshape(len(images), c.budget, c.patch, c.patch, 3)
        else:  # a rest smaller than a patch is cut off
            pixels = images[:, : c.side * c.patch, : c.side * c.patch]
            pixels = pixels.reshape(-1, c.side, c.patch, c.side, c.patch, 3).swapaxes(2, 3)
        pixels = (pixels.astype(jnp.float32) / 255 - jnp.array(c.mean)) / jnp.array(c.std)
        return self.patch(pixels.astype(self.dtype)).reshape(len(images), c.patches, -1)

    def grid_positions(self, images):
        """Position embeddings of the patches, [patches, width], resized to the grid of this image size.

        Of images of any shape they are [batch, patches, width], resized to the grid of each.
        """
        c, table = self.config, self.position[...][self.config.class_token :]
        if c.budget:
            _, *places = Grids.of(images)
            return sampled(table.reshape(c.grid, c.grid, -1), *places).astype(table.dtype)
        if not c.resized:
            return table
        matrix = jnp.array(resize_matrix(c.position_grid, c.side, c.position_resize))
        grid = table.reshape(c.position_grid, c.position_grid, -1).astype(jnp.float32)
        grid = jnp.einsum("ip,jq,pqd->ijd", matrix, matrix, grid, precision="highest")
        return grid.reshape(c.patches, -1).astype(table.dtype)

    def embed(self, images):
        """Maps images to hidden state 0, [batch, seq, width].

        Its sequence is the class token, the registers, then the patches.
        """
        c = self.config
        x = self.patches(images) + self.grid_positions(images)
        first = [self.class_token[...][None] + self.position[...][:1]] if c.class_token else []
        first += [self.registers[...]] if c.registers else []
        if first:
            first = jnp.concatenate(first)
            x = jnp.concatenate([jnp.broadcast_to(first, (len(x), *first.shape)).astype(x.dtype), x], axis=1)
        return x if self.pre_norm is None else self.pre_norm(x)

    def features(self, state):
        """The feature rows of a hidden state, [batch, rows, width].

        They are the patches, after the class token if it is kept.
        """
        c = self.config
        patches = state[:, c.class_token + c.registers :]
        return jnp.concatenate([state[:, :1], patches], axis=1) if c.keep_class_token else patches

    def fold(self, media, each, start, items=None, skip=0, remat="none"):
        """Calls `acc, y = each(acc, state, items[i])` on every hidden state from number `skip` on, in order.

        The first `acc` is `start`. `items` is a tree of arrays whose leading axis has one entry for each of
        these states. Returns the last `acc`, and the ys stacked. No state is kept beyond its call, unless
        `each` keeps it.
        """
        block = self.block(media)
        x, _ = run_stack(first_layers(self.layers, skip), self.embed(media), block, remat=remat)
        acc, first = each(start, x, jax.tree.map(lambda a: a[0], items))

        def step(layer, carry, item):
            x, _ = block(layer, carry[0])
            acc, y = each(carry[1], x, item)
            return (x, acc), y

        items = jax.tree.map(lambda a: a[1:], items)
        (_, acc), ys = run_stack(last_layers(self.layers, skip), (x, acc), step, items, remat)
        return acc, jax.tree.map(lambda y, rest: jnp.concatenate([y[None], rest]), first, ys)

    def hidden_states(self, images):
        """All hidden states, [layers + 1, batch, seq, width]."""
        return self.fold(images, lambda acc, state, _: (acc, state), None)[1]

    def __call__(self, media, remat="none"):
        """Maps images to features [batch, rows, width] of the configured layer.

        Blocks above that layer do not run.
        """
        c = self.config
        depth = c.feature_layer if c.feature_layer >= 0 else c.layers + 1 + c.feature_layer
        layers = first_layers(self.layers, depth)
        x, _ = run_stack(layers, self.embed(media), self.block(media), remat=remat)
        return self.features(self.post_norm(x) if c.feature_norm else x)
