"""Normalisation, computed in float32 whatever the dtype of the input."""

import jax
import jax.numpy as jnp

from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import ones, zeros


class LayerNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale, self.bias, self.eps = ones(width), zeros(width), eps

    def __call__(self, x):  # [..., width]
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.scale, self.eps = ones(width), eps

    def __call__(self, x):  # [..., width]
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...]


class HeadsNorm(nnx.Module):
    """RMS norm over all heads at once, as in InternViT."""

    def __init__(self, heads: int, size: int, eps: float):
        self.scale, self.eps = ones(heads, size), eps

    def __call__(self, x):  # [batch, heads, seq, head_dim]
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean((1, 3), keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale[...][:, None]
