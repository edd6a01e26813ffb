"""Rotary position embedding (arXiv 2104.09864).

Text uses the half-split form of the Llama family, a grid of patches the interleaved form of EVA-02. A
rotation is made before the layers that use it, so that a step of training computes its cosines once: inside
of a layer XLA computes them for every head.
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


def over_text(positions, frequency, dtype):
    """A function that rotates x [batch, heads..., seq, head_dim] by its positions int32[batch, seq].

    Angles are float32. `frequency` is float32[head_dim / 2], in radians per position, `dtype` that of x.
    """
    cos, sin = cos_and_sin(positions[:, :, None] * frequency, dtype)  # [batch, seq, head_dim / 2]

    def turn(x):
        heads = tuple(range(1, x.ndim - 2))
        turned = rotated(*jnp.split(x, 2, axis=-1), jnp.expand_dims(cos, heads), jnp.expand_dims(sin, heads))
        return jnp.concatenate(turned, axis=-1)

    return turn


def over_grid(side: int, trained_side: int, theta: float, skipped: int, size: int, dtype):
    """A function that rotates x [batch, heads, seq, size] by the row and column of each patch.

    The sequence is `skipped` tokens, which stay as they are, and then side * side patches. The first half
    of the channel pairs (2i, 2i + 1) turns by the row, the second half by the column, both counted in units
    of the grid that the model was trained for (arXiv 2303.11331, section 2.1). `dtype` is that of x.
    """
    bands = theta ** -(jnp.arange(size // 4, dtype=jnp.float32) / (size // 4))
    steps = jnp.arange(side, dtype=jnp.float32)[:, None] / side * trained_side * bands  # [side, bands]
    rows, columns = jnp.repeat(steps, side, axis=0), jnp.tile(steps, (side, 1))
    cos, sin = cos_and_sin(jnp.concatenate([rows, columns], axis=-1), dtype)  # [side * side, size / 2]

    def turn(x):
        first, patches = x[..., :skipped, :], x[..., skipped:, :]
        turned = jnp.stack(rotated(patches[..., 0::2], patches[..., 1::2], cos, sin), axis=-1)
        return jnp.concatenate([first, turned.reshape(patches.shape)], axis=-2)

    return turn


def cos_and_sin(angle, dtype):
    """Both of angles float32[...], in another dtype."""
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotated(a, b, cos, sin):
    """The points (a, b) of a plane, turned."""
    return a * cos - b * sin, b * cos + a * sin
