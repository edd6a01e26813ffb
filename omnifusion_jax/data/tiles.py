"""A large picture as several squares: the whole of it first, small, then the tiles of a grid that suits its shape, and the order of their features.

    +-----------+      +---+   +---+---+       tiles: 0, then 1 2 / 3 4
    |  picture  |  ->  | 0 |   | 1 | 2 |
    |           |      +---+   +---+---+       order, by tiles:      all rows of 0, of 1, of 2, of 3, of 4
    +-----------+              | 3 | 4 |       order, by lines:      all rows of 0, then the upper line of patches of 1 and of 2, the second line
                               +---+---+                             of both, ... down to the lowest line of 3 and 4

Known as any-resolution tiles (LLaVA-NeXT, the "grid split" of OmniFusion 1.1). NumPy and Pillow only.
"""

import math

import numpy as np
from PIL import Image

from omnifusion_jax.data.images import fit

GRIDS = (
    (1, 2),
    (2, 1),
    (2, 2),
    (3, 1),
    (1, 3),
)  # (rows, columns) of tiles: LLaVA-NeXT's `image_grid_pinpoints` over 336
NEWLINE = -1  # in an order: here stands the trained newline vector


def best_grid(size_hw, grids, tile):
    """The (rows, columns) of `grids` in whose `tile`-pixel tiles a picture of (height, width) keeps most pixels.

    Of grids that keep as many it is the smallest, and of those the first.

    As transformers' `select_best_resolution`, truncations and rounding errors included: of a strip that would be less than a pixel thin nothing is
    kept in any grid, and it gets the smallest, upright or not.
    """
    height, width = size_hw

    def kept_and_wasted(grid):
        tall, wide = grid[0] * tile, grid[1] * tile
        scale = min(wide / width, tall / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - tall * wide

    return max(grids, key=kept_and_wasted)


def tiles(image, size, grids=GRIDS):
    """uint8[1 + rows * columns, size, size, 3] of an RGB PIL image: all of it squashed, then its tiles row by row.

    For the tiles it is scaled with its aspect to the best grid and lies in the middle of black, an odd pixel more below or to the right. Equals
    transformers' `LlavaNextImageProcessorPil` before rescaling, of which `image_grid_pinpoints` are `grids` in pixels.
    """
    rows, columns = best_grid((image.height, image.width), grids, size)
    canvas = Image.new("RGB", (columns * size, rows * size))
    inside = _inside(image.size, canvas.size)
    corner = tuple((outer - inner) // 2 for outer, inner in zip(canvas.size, inside, strict=True))
    canvas.paste(image.resize(inside, Image.Resampling.BICUBIC), corner)
    cut = (
        np.asarray(canvas).reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    )  # [rows, columns, size, size, 3]
    return np.concatenate([fit(image, size, "squash")[None], cut.reshape(-1, size, size, 3)])


def order(size_hw, grids, tile, side, newline=False, unpad=False):
    """int32[rows]: which feature row stands where in the sequence, for a picture of (height, width) pixels whose tiles have side * side patches each.

    Feature rows are counted through all tiles, tile * side**2 + patch; the whole picture's come first. Then, by what the model was trained with:

    | newline | unpad | the tiles' rows                                                     |
    |---------|-------|---------------------------------------------------------------------|
    | no      | no    | tile after tile, line by line within each (OmniFusion's grid split) |
    | no      | yes   | line by line across the whole grid, padded lines or columns removed |
    | yes     | no    | line by line across the whole grid, NEWLINE after each line         |
    | yes     | yes   | both (LLaVA-NeXT): `pack_image_features` of transformers            |

    Of a thin strip no line, or nothing in the lines, may be left: then only the whole picture stands there, and the newlines of empty lines.
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


def most(grids):
    """The largest number of squares that `tiles` gives, the whole picture included."""
    return 1 + max(rows * columns for rows, columns in grids)


def _inside(size, canvas):
    """The largest (width, height) of the aspect of `size` within `canvas`; what is not whole is rounded up."""
    scale = min(outer / side for side, outer in zip(size, canvas, strict=True))
    return tuple(min(math.ceil(side * scale), outer) for side, outer in zip(size, canvas, strict=True))


def _unpadded(lines, size_hw):
    """`lines` [tall, wide] without the padded ones at the edges, by the rule of transformers' `unpad_image`.

    As many go on either side: kept is the picture's height (or width) in patches, truncated, and one more where that leaves an odd number to remove.
    So a line that shows padding in part may go or stay.
    """
    scale = min(outer / side for side, outer in zip(size_hw, lines.shape, strict=True))
    kept = (
        int(round(side * scale, 7)) for side in size_hw
    )  # 7 digits: what is whole but for the rounding error of `scale` is not truncated
    top, left = ((outer - inner) // 2 for inner, outer in zip(kept, lines.shape, strict=True))
    return lines[top : lines.shape[0] - top, left : lines.shape[1] - left]
