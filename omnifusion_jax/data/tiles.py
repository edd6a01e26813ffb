"""Cuts a large picture into tiles, and gives the order of their feature rows.

The first tile is the whole picture, scaled down; the others form a grid that suits its shape.

    +-----------+      +---+   +---+---+    tile by tile: all rows of 0, of 1, of 2, of 3, of 4
    |  picture  |  ->  | 0 |   | 1 | 2 |
    |           |      +---+   +---+---+    line by line: all rows of 0, then the top line of patches of 1
    +-----------+              | 3 | 4 |                  and 2, the second line of both, ... down to the
                               +---+---+                  bottom line of 3 and 4

LLaVA-NeXT calls this any-resolution tiles, OmniFusion 1.1 the grid split. NumPy and Pillow only.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from omnifusion_jax.data.images import fit

# (rows, columns) of tiles: LLaVA-NeXT's `image_grid_pinpoints`, divided by 336
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
NEWLINE = -1  # stands in an order for the trained newline vector


def best_grid(size_hw: tuple[int, int], grids: Sequence[tuple[int, int]], tile: int) -> tuple[int, int]:
    """The (rows, columns) of `grids`, with tiles of `tile` pixels, that keeps most pixels of (height, width).

    If several grids keep equally many, the smallest of them is chosen, and of equally small ones the first.

    This is transformers' `select_best_resolution` with its truncations and rounding errors. A strip that
    would be scaled to less than one pixel keeps nothing in any grid, so it gets the smallest one, whether it
    is upright or not.
    """
    height, width = size_hw

    def kept_and_wasted(grid):
        tall, wide = grid[0] * tile, grid[1] * tile
        scale = min(wide / width, tall / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - tall * wide

    return max(grids, key=kept_and_wasted)


def tiles(image: Image.Image, size: int, grids: Sequence[tuple[int, int]] = GRIDS) -> np.ndarray:
    """Cuts an RGB PIL image into uint8[1 + rows * columns, size, size, 3].

    The first tile is the whole picture, squashed. For the others, row by row, the picture is scaled to the
    best grid with its aspect kept, and centred on black; an odd pixel of padding goes below or to the right.
    The result equals that of transformers' `LlavaNextImageProcessorPil` before rescaling, with `grids` in
    pixels as its `image_grid_pinpoints`.
    """
    rows, columns = best_grid((image.height, image.width), grids, size)
    canvas = Image.new("RGB", (columns * size, rows * size))
    inside = _inside(image.size, canvas.size)
    corner = tuple((outer - inner) // 2 for outer, inner in zip(canvas.size, inside, strict=True))
    canvas.paste(image.resize(inside, Image.Resampling.BICUBIC), corner)
    # [rows, columns, size, size, 3]
    cut = np.asarray(canvas).reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    return np.concatenate([fit(image, size, "squash")[None], cut.reshape(-1, size, size, 3)])


def order(
    size_hw: tuple[int, int],
    grids: Sequence[tuple[int, int]],
    tile: int,
    side: int,
    newline: bool = False,
    unpad: bool = False,
) -> np.ndarray:
    """int32[positions]: the feature rows of a picture of (height, width) pixels in the order of the sequence.

    Each tile has `tile` pixels and `side` patches a side. Feature rows are numbered through all tiles, as
    tile * side**2 + patch. Those of the whole picture come first; the order of the others depends on what the
    model was trained with:

    | newline | unpad | the tiles' rows                                                     |
    |---------|-------|---------------------------------------------------------------------|
    | no      | no    | tile after tile, line by line within each (OmniFusion's grid split) |
    | no      | yes   | line by line across the whole grid, padded lines or columns removed |
    | yes     | no    | line by line across the whole grid, NEWLINE after each line         |
    | yes     | yes   | both (LLaVA-NeXT): `pack_image_features` of transformers            |

    Unpadding a thin strip may leave no lines, or only empty ones. The order then holds the rows of the whole
    picture and the newlines of the empty lines.
    """
    rows, columns = best_grid(size_hw, grids, tile)
    feature = np.arange((1 + rows * columns) * side**2, dtype=np.int32)
    if not (newline or unpad):
        return feature
    whole, tiled = np.split(feature, [side**2])
    lines = tiled.reshape(rows, columns, side, side).swapaxes(1, 2).reshape(rows * side, columns * side)
    if unpad:
        lines = _unpadded(lines, size_hw)
    if newline:
        lines = np.pad(lines, ((0, 0), (0, 1)), constant_values=NEWLINE)
    return np.concatenate([whole, lines.ravel()])


def most(grids: Sequence[tuple[int, int]]) -> int:
    """The largest number of tiles that `tiles` gives, the whole picture included."""
    return 1 + max(rows * columns for rows, columns in grids)


def _inside(size, canvas):
    """The largest (width, height) of the aspect of `size` within `canvas`, rounded up to whole pixels."""
    scale = min(outer / side for side, outer in zip(size, canvas, strict=True))
    return tuple(min(math.ceil(side * scale), outer) for side, outer in zip(size, canvas, strict=True))


def _unpadded(lines, size_hw):
    """`lines` [tall, wide] without those of padding, by the rule of transformers' `unpad_image`.

    Equally many lines (or columns) go on both sides. What stays is the picture's height (or width) in
    patches, truncated, and one more if an odd number would have to go. So a line that is padding in part may
    go or stay.
    """
    scale = min(outer / side for side, outer in zip(size_hw, lines.shape, strict=True))
    # rounding to 7 digits keeps a whole number whole, which the rounding error of `scale` would truncate
    kept = tuple(int(round(side * scale, 7)) for side in size_hw)
    top, left = ((outer - inner) // 2 for inner, outer in zip(kept, lines.shape, strict=True))
    return lines[top : lines.shape[0] - top, left : lines.shape[1] - left]
