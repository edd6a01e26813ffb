"""Resizing of a grid by one matrix for each axis.

The result equals that of PyTorch's `interpolate` up to rounding. Libraries differ in how they resize position
embeddings to another image size, and weights need the way that they were trained with:

    bicubic            transformers (DINOv2, SigLIP, InternViT): Keys' cubic with a = -0.75, no antialiasing
    bicubic_antialias  timm, and DINOv2 with registers: a = -0.5, with a wider kernel when the grid shrinks
    bicubic_offset     the original DINOv2: "bicubic" with the scale of a grid that is 0.1 larger
    bilinear           for features, not for position embeddings
"""

import jax.numpy as jnp
import numpy as np


def cubic(x, a, xp=np):
    """Keys' convolution kernel (IEEE TASSP 29, 1981)."""
    x = abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return xp.where(x <= 1, near, xp.where(x < 2, far, 0.0))


def plain(old, new, scale):
    """Bicubic without antialiasing; coordinates are scaled by `scale`, which is about new / old."""
    centre = (np.arange(new) + 0.5) / scale - 0.5
    taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)  # [new, 4]
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), cubic(centre[:, None] - taps, -0.75))
    return matrix


def antialiased(old, new, at, xp=np):
    """Bicubic with antialiasing: samples outside the grid are left out, and the other weights sum to 1.

    Gives the weights [..., old] of the samples `at` [...] of `new`, which may differ from sample to sample.
    """
    wide = xp.maximum(old / new, 1.0)
    distance = (xp.arange(old) + 0.5) - ((at + 0.5) * old / new)[..., None]
    weights = cubic(distance / wide[..., None], -0.5, xp)
    return weights / weights.sum(axis=-1, keepdims=True)


def bilinear(old, new):
    centre = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    return np.maximum(0.0, 1 - np.abs(centre[:, None] - np.arange(old)))


RESIZE = {
    "bicubic": lambda old, new: plain(old, new, new / old),
    "bicubic_antialias": lambda old, new: antialiased(old, new, np.arange(new)),
    "bicubic_offset": lambda old, new: plain(old, new, (new + 0.1) / old),
    "bilinear": bilinear,
}


def resize_matrix(old: int, new: int, how: str) -> np.ndarray:
    """The matrix float32[new, old] that resizes an axis from `old` to `new` samples, by a row of RESIZE."""
    return RESIZE[how](old, new).astype(np.float32)


def resize_rows(x, rows: int, how: str):
    """Resizes a square grid given as its rows, from [batch, n, width] to [batch, rows, width]."""
    old, new = (round(n**0.5) for n in (x.shape[1], rows))
    if old == new:
        return x
    matrix = jnp.array(resize_matrix(old, new, how), x.dtype)
    grid = x.reshape(len(x), old, old, -1)
    return jnp.einsum("ip,jq,bpqd->bijd", matrix, matrix, grid).reshape(len(x), rows, -1)


def sampled(grid, row, column, height, width):
    """Samples of a square grid [old, old, channels] that is resized to another one at each of them.

    Args:
      row, column: which sample, int32[batch, n].
      height, width: the sizes to which the grid is resized, int32[batch, 1].

    Returns: float32[batch, n, channels], resized as "bicubic_antialias" does.
    """
    old = len(grid)
    down, across = (
        antialiased(old, new, at.astype(jnp.float32), jnp) for new, at in ((height, row), (width, column))
    )
    weights = (down[..., :, None] * across[..., None, :]).reshape(*row.shape, old**2)
    grid = grid.reshape(old**2, -1).astype(jnp.float32)
    return jnp.einsum("bnp,pd->bnd", weights, grid, precision="highest")
