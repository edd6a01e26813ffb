"""Rotary position embedding (arXiv 2104.09864).

Text uses the half-split form of the Llama family, a grid of patches the interleaved form of EVA-02.
"""

import math

import jax.numpy as jnp

from omnifusion_jax.config import RopeScaling


def frequencies(half: int, theta: float, scaling: RopeScaling | None = None):
    """Radians per position, float32[half]: theta ** -(i / half), scaled as in Llama 3.1 if asked for."""
    found = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    return found if scaling is None else stretched(found, scaling)


def stretched(found, c: RopeScaling):
    """Divides low frequencies by `factor`, keeps high ones and blends those between.

    This is `_compute_llama3_parameters` of transformers.
    """
    # Full turns of each frequency over the positions that the model was first trained for
    turns = c.trained_length * found / (2 * math.pi)
    kept = jnp.clip((turns - c.low) / (c.high - c.low), 0, 1)
    return found * (kept + (1 - kept) / c.factor)


def rotary(x, positions, frequency):
    """Rotates x [batch, heads..., seq, head_dim] by its positions int32[batch, seq], with float32 angles.

    `frequency` is float32[head_dim / 2], in radians per position.
    """
    half = x.shape[-1] // 2
    angle = positions[:, :, None] * frequency  # [batch, seq, half]
    angle = jnp.expand_dims(angle, tuple(range(1, x.ndim - 2)))
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def over_grid(side: int, trained_side: int, theta: float, skipped: int):
    """A function that rotates x [batch, heads, seq, head_dim] by the row and column of each patch.

    The sequence is `skipped` tokens, which stay as they are, and then side * side patches. The first half
    of the channel pairs (2i, 2i + 1) turns by the row, the second half by the column, both counted in units
    of the grid that the model was trained for (arXiv 2303.11331, section 2.1).
    """

    def turn(x):
        bands = theta ** -(jnp.arange(x.shape[-1] // 4, dtype=jnp.float32) / (x.shape[-1] // 4))
        steps = jnp.arange(side, dtype=jnp.float32)[:, None] / side * trained_side * bands  # [side, bands]
        rows, columns = jnp.repeat(steps, side, axis=0), jnp.tile(steps, (side, 1))
        angle = jnp.concatenate([rows, columns], axis=-1)  # [side * side, head_dim / 2]
        cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
        first, patches = x[..., :skipped, :], x[..., skipped:, :]
        a, b = patches[..., 0::2], patches[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(patches.shape)
        return jnp.concatenate([first, turned], axis=-2)

    return turn
