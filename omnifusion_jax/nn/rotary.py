"""Rotary position embedding (arXiv 2104.09864), in the half-split form of the Llama family."""

import jax.numpy as jnp


def rotary(x, positions, theta):
    """Rotates x [batch, heads..., seq, head_dim] by its positions int32[batch, seq]; angles in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None] * frequency  # [batch, seq, half]
    angle = jnp.expand_dims(angle, tuple(range(1, x.ndim - 2)))
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
