"""A trained combination of an encoder's hidden states (arXiv 2404.06212, section 3.1).

It is accumulated while the encoder runs, so that the hidden states of a frozen encoder are never all in
memory at once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from omnifusion_jax.config import AdapterConfig, EncoderConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import INITS
from omnifusion_jax.nn.linear import product
from omnifusion_jax.nn.norms import LayerNorm


class LayerMap(nnx.Module):
    """What one hidden state contributes: weight * (norm(state) @ kernel + bias).

    The norm is this layer's own; where there is none, it is the shared norm that the caller passes in.
    """

    def __init__(self, c: AdapterConfig, width: int, out: int, states: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jnp.full((), 1 / states))
        init = INITS[c.init].linear
        self.kernel = init.kernel(rngs, width, out, fan_in=width)
        self.bias = init.bias(rngs, out, fan_in=width) if c.bias == "layers" else None
        self.norm = None if c.shared_norm else LayerNorm(width, c.eps)

    def __call__(self, norm, state):  # [batch, rows, width] to float32[batch, rows, out]
        x = (self.norm or norm)(state)
        y = product(x, self.kernel[...], dtype=jnp.float32)
        y = y if self.bias is None else y + self.bias[...].astype(jnp.float32)
        return y * self.weight[...].astype(jnp.float32)


class Mix(nnx.Module):
    """The sum over l of weight_l * (norm(state_l) @ kernel_l + bias_l).

    It runs over the hidden states from number `first_state` on. Instead of a bias in every term, the sum
    may have a single one, or none.
    """

    def __init__(self, encoder: EncoderConfig, c: AdapterConfig, out: int, *, rngs: nnx.Rngs):
        states = encoder.layers + 1 - c.first_state
        self.skipped = c.first_state
        self.norm = LayerNorm(encoder.width, c.eps) if c.shared_norm else None
        self.bias = INITS[c.init].linear.bias(rngs, out, fan_in=encoder.width) if c.bias == "one" else None
        make = lambda rngs: LayerMap(c, encoder.width, out, states, rngs=rngs)
        self.layers = nnx.stacked(make, states, rngs)

    def __call__(self, encoder, images, remat="none"):
        """Maps uint8[batch, size, size, 3] to [batch, rows, out]; the terms are summed in float32."""
        y = mixed(self, encoder, images, remat).astype(encoder.dtype)
        return y if self.bias is None else y + self.bias[...]


def accumulate(mix, encoder, images, remat):
    """The sum of all terms without the single bias, float32[batch, rows, out], in one run of the encoder."""

    def each(acc, state, layer):
        return acc + layer(mix.norm, encoder.features(state)), None

    c = encoder.config
    start = jnp.zeros((len(images), c.rows, mix.layers.kernel.shape[-1]), jnp.float32)
    return encoder.fold(images, each, start, mix.layers, skip=mix.skipped, remat=remat)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def mixed(mix, encoder, images, remat):
    """`accumulate`, with a backward pass that keeps no hidden states either.

    The gradient of the sum is the same for every layer. If the encoder is frozen, it therefore runs once
    more, and each layer's gradient is computed as its hidden state comes up. If the encoder is trained,
    everything is differentiated as usual.
    """
    return accumulate(mix, encoder, images, remat)


def forward(mix, encoder, images, remat):
    leaves = jax.tree.leaves(encoder)
    # An empty tuple or None is tree structure, not data, so `backward` can branch on it while tracing.
    trained = () if any(leaf.perturbed for leaf in leaves) else None
    mix, encoder, images = (jax.tree.map(lambda leaf: leaf.value, tree) for tree in (mix, encoder, images))
    return accumulate(mix, encoder, images, remat), (mix, encoder, images, trained)


def backward(remat, kept, gradient):
    mix, encoder, images, trained = kept
    if isinstance(gradient, SymbolicZero):
        gradient = jnp.zeros(gradient.shape, gradient.dtype)
    if trained is not None:
        _, pull = jax.vjp(lambda mix, encoder: accumulate(mix, encoder, images, remat), mix, encoder)
        return *pull(gradient), None

    def each(acc, state, layer):
        _, pull = jax.vjp(lambda norm, layer: layer(norm, encoder.features(state)), mix.norm, layer)
        norm, layer = pull(gradient)
        return jax.tree.map(jnp.add, acc, norm), layer

    start = jax.tree.map(jnp.zeros_like, mix.norm)
    norm, layers = encoder.fold(images, each, start, mix.layers, skip=mix.skipped)
    ours = jax.tree.map(jnp.zeros_like, mix)
    ours.norm, ours.layers = norm, layers
    return ours, None, None


mixed.defvjp(forward, backward, symbolic_zeros=True)
