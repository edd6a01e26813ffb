"""Rotary position embedding (arXiv 2104.09864): of a text in the half-split form of the Llama family, of a grid in the
interleaved form of EVA-02."""

import math

import jax.numpy as jnp

from omnifusion_jax.config import RopeScaling


def frequencies(half, theta, scaling: RopeScaling | None = None):
    """Radians a position, float32[half]: theta ** -(i / half), and those of Llama 3.1 where they are scaled."""
    found = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    return found if scaling is None else stretched(found, scaling)


def stretched(found, c: RopeScaling):
    """Low frequencies divided by `factor`, high ones kept, those between mixed, as transformers'
    `_compute_llama3_parameters` has it."""
    turns = (
        c.trained_length * found / (2 * math.pi)
    )  # of a frequency, over the positions it was first trained for
    kept = jnp.clip((turns - c.low) / (c.high - c.low), 0, 1)
    return found * (kept + (1 - kept) / c.factor)


def rotary(x, positions, frequency):
    """Rotates x [batch, heads..., seq, head_dim] by its positions int32[batch, seq]; angles in float32."""
    half = x.shape[-1] // 2
    angle = positions[:, :, None] * frequency  # [batch, seq, half]
    angle = jnp.expand_dims(angle, tuple(range(1, x.ndim - 2)))
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def over_grid(side, trained_side, theta, skipped):
    """What rotates x [batch, heads, seq, head_dim] of `skipped` tokens and then side * side patches, by row and column.

    The first half of the pairs (2i, 2i + 1) turns by the row, the second by the column, in units of the grid that it
    was trained for (arXiv 2303.11331, section 2.1).
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
