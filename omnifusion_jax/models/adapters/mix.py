"""A trained combination of all layers of an encoder, accumulated while the encoder runs (arXiv 2404.06212, section 3.1)."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from omnifusion_jax.config import AdapterConfig, EncoderConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import INITS
from omnifusion_jax.nn.norms import LayerNorm


class LayerMap(nnx.Module):
    """What one hidden state contributes: weight * (norm(state) @ kernel + bias). The norm is this layer's own, or shared and given."""

    def __init__(self, c: AdapterConfig, width, out, states, *, rngs):
        self.weight = nnx.Param(jnp.full((), 1 / states))
        init = INITS[c.init].linear
        self.kernel = init.kernel(rngs, width, out, fan_in=width)
        self.bias = init.bias(rngs, out, fan_in=width) if c.bias == "layers" else None
        self.norm = None if c.shared_norm else LayerNorm(width, c.eps)

    def __call__(self, norm, state):  # [batch, rows, width] to float32[batch, rows, out]
        y = jnp.einsum(
            "btd,de->bte", (self.norm or norm)(state), self.kernel[...], preferred_element_type=jnp.float32
        )
        y = y if self.bias is None else y + self.bias[...].astype(jnp.float32)
        return y * self.weight[...].astype(jnp.float32)


class Mix(nnx.Module):
    """The sum over l of weight_l * (norm(state_l) @ kernel_l + bias_l), of the hidden states from `first_state` on. It may have one bias instead."""

    def __init__(self, encoder: EncoderConfig, c: AdapterConfig, out, *, rngs):
        states = encoder.layers + 1 - c.first_state
        self.skipped = c.first_state
        self.norm = LayerNorm(encoder.width, c.eps) if c.shared_norm else None
        self.bias = INITS[c.init].linear.bias(rngs, out, fan_in=encoder.width) if c.bias == "one" else None
        self.layers = nnx.stacked(
            lambda rngs: LayerMap(c, encoder.width, out, states, rngs=rngs), states, rngs
        )

    def __call__(self, encoder, images):
        """uint8[batch, size, size, 3] to [batch, rows, out]. The sum is in float32."""
        y = mixed(self, encoder, images).astype(encoder.dtype)
        return y if self.bias is None else y + self.bias[...]


def accumulate(mix, encoder, images):
    def each(acc, state, layer):
        return acc + layer(mix.norm, encoder.features(state)), None

    c = encoder.config
    start = jnp.zeros((len(images), c.rows, mix.layers.kernel.shape[-1]), jnp.float32)
    return encoder.fold(images, each, start, mix.layers, skip=mix.skipped)[0]


@jax.custom_vjp
def mixed(mix, encoder, images):
    """`accumulate`, whose backward pass keeps no hidden states either: every layer gets the same gradient of the sum, so a frozen encoder only has
    to run once more while each layer's share is taken. An encoder that is trained is differentiated as usual.
    """
    return accumulate(mix, encoder, images)


def forward(mix, encoder, images):
    leaves = jax.tree.leaves(encoder)
    trained = (
        () if any(leaf.perturbed for leaf in leaves) else None
    )  # structure, not data: it is known while tracing
    mix, encoder, images = (jax.tree.map(lambda leaf: leaf.value, tree) for tree in (mix, encoder, images))
    return accumulate(mix, encoder, images), (mix, encoder, images, trained)


def backward(kept, gradient):
    mix, encoder, images, trained = kept
    if isinstance(gradient, SymbolicZero):
        gradient = jnp.zeros(gradient.shape, gradient.dtype)
    if trained is not None:
        _, pull = jax.vjp(lambda mix, encoder: accumulate(mix, encoder, images), mix, encoder)
        return *pull(gradient), None

    def each(acc, state, layer):
        _, pull = jax.vjp(lambda norm, layer: layer(norm, encoder.features(state)), mix.norm, layer)
        norm, layer = pull(gradient)
        return jax.tree.map(jnp.add, acc, norm), layer

    norm, layers = encoder.fold(
        images, each, jax.tree.map(jnp.zeros_like, mix.norm), mix.layers, skip=mix.skipped
    )
    ours = jax.tree.map(jnp.zeros_like, mix)
    ours.norm, ours.layers = norm, layers
    return ours, None, None


mixed.defvjp(forward, backward, symbolic_zeros=True)
