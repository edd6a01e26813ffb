"""Cuts a large picture into slices of the shape that suits it, as MiniCPM-V 2.0 does (arXiv 2403.11703).

The whole picture comes first, scaled to about `scale` x `scale` pixels; then, if it has more, its slices,
each of about so many pixels again. Nothing is squashed or padded: sides are multiples of a patch.

    +-----------+      +-----+   +---+---+
    |  picture  |  ->  |  0  |   | 1 | 2 |
    |           |      +-----+   +---+---+
    +-----------+                | 3 | 4 |
                                 +---+---+

NumPy and Pillow only.
"""

import dataclasses
import math
from typing import NamedTuple, Self

import numpy as np
from PIL import Image

from omnifusion_jax.batch import LINE_END, PATCH, Tile
from omnifusion_jax.config import ImageConfig
from omnifusion_jax.config.base import check
from omnifusion_jax.data.images import image_size, open_image
from omnifusion_jax.data.modality import Prepared
from omnifusion_jax.errors import DataError


class Plan(NamedTuple):
    """How a picture is sliced; sizes are (width, height) in pixels."""

    whole: tuple[int, int]
    grid: tuple[int, int] = (0, 0)  # (rows, columns) of the slices; (0, 0): there are none
    slice: tuple[int, int] = (0, 0)


def plan(size: tuple[int, int], scale: int, patch: int, most: int) -> Plan:
    """The Plan of a picture of (width, height), with at most `most` slices."""
    width, height = size
    wanted = min(math.ceil(width * height / scale**2), most)
    if wanted <= 1:
        return Plan(scaled(width, height, scale, patch))
    counts = (n for n in (wanted - 1, wanted, wanted + 1) if 1 < n <= most)
    grids = [(columns, n // columns) for n in counts for columns in range(1, n + 1) if n % columns == 0]
    columns, rows = min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[0] / grid[1])))
    cell = whole(width, columns) / columns, whole(height, rows) / rows
    return Plan(scaled(width, height, scale, patch), (rows, columns), scaled(*cell, scale, patch))


def scaled(width: float, height: float, scale: int, patch: int) -> tuple[int, int]:
    """The size of about scale**2 pixels with this aspect, in whole patches."""
    aspect = width / height
    tall = int(scale / math.sqrt(aspect))
    return whole(int(tall * aspect), patch), whole(tall, patch)


def whole(length: float, unit: int) -> int:
    """The multiple of `unit` next to a length, one at least; the even one of two equally near."""
    return max(round(length / unit) * unit, unit)


def sliced(image: Image.Image, how: Plan) -> list[np.ndarray]:
    """The whole picture and its slices, row by row: uint8[height, width, 3] each."""
    found = [np.asarray(image.resize(how.whole, Image.Resampling.BICUBIC))]
    rows, columns = how.grid
    if rows:
        wide, tall = how.slice
        large = np.asarray(image.resize((wide * columns, tall * rows), Image.Resampling.BICUBIC))
        cut = large.reshape(rows, tall, columns, wide, 3).swapaxes(1, 2)
        found += list(cut.reshape(-1, tall, wide, 3))
    return found


def in_patches(pixels: np.ndarray, patch: int, budget: int) -> np.ndarray:
    """uint8[height, width, 3] as uint8[budget, 3 * patch**2 + 1], see batch.PATCH."""
    rows, columns = (side // patch for side in pixels.shape[:2])
    cut = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2)
    found = np.zeros((budget, 3 * patch**2 + 1), np.uint8)
    lines = found[: rows * columns].reshape(rows, columns, -1)
    lines[..., :-1] = cut.reshape(rows, columns, -1)
    lines[..., -1], lines[:, -1, -1] = PATCH, LINE_END
    return found


@dataclasses.dataclass
class SliceProcessor:
    """Turns any source that `open_image` takes into a Prepared picture of slices. Raises DataError.

    It keeps only what it needs of a model's config, because worker processes do without JAX.
    """

    scale: int  # pixels a side of a square with as many pixels as a slice has
    patch: int
    budget: int  # patches that a slice may have
    most: int  # slices beside the whole picture
    rows: int  # feature rows of one slice
    max_pixels: int = 50_000_000

    @classmethod
    def of(cls, c: ImageConfig, max_pixels: int = 50_000_000, draft: bool = False) -> Self:
        """The processor of an ImageConfig. Raises ConfigError for what cannot go together."""
        check(not draft, "data.draft shrinks pictures, image.fit=slices shows them large")
        [view] = c.views
        return cls(view.size, *view.patches, c.slices, c.rows, max_pixels)

    @property
    def room(self) -> int:
        """The largest number of slices of a picture, the whole one included."""
        return 1 + (self.most if self.most > 1 else 0)

    @property
    def positions(self) -> int:
        """The largest number of positions that a picture takes in a sequence."""
        return self.room * self.rows

    def tile(self, number: int) -> Tile:
        """What batches need to know of its slices; `number` is that of the stream."""
        return Tile(number, ((self.budget, 3 * self.patch**2 + 1),), np.uint8, self.rows)

    def __call__(self, source) -> Prepared:
        picture = open_image(source, max_pixels=self.max_pixels)
        how = self.plan(picture.size)
        return self.prepared([in_patches(a, self.patch, self.budget) for a in sliced(picture, how)], how)

    def outline(self, source) -> Prepared:
        """The same with slices of no patches, from the file's header alone: enough to lay out a sequence.

        Raises:
          DataError: the header shows that `source` cannot be used. It does not show damage further on.
        """
        how = self.plan(image_size(source, max_pixels=self.max_pixels))
        return self.prepared([np.zeros((0, 0), np.uint8)] * (1 + math.prod(how.grid)), how)

    def plan(self, size):
        """The Plan of a picture of (width, height). Raises DataError where a slice has too many patches."""
        how = plan(size, self.scale, self.patch, self.most)
        most = max(wide * tall // self.patch**2 for wide, tall in (how.whole, how.slice))
        if most > self.budget:
            raise DataError(
                f"{size[0]} x {size[1]} pixels make a slice of {most:,} patches, "
                f"and {self.budget:,} (encoder.budget) are allowed: such a strip is too long. Cut it",
                "size",
            )
        return how

    def prepared(self, slices, how):
        rows = len(slices) * self.rows
        return Prepared((np.stack(slices),), np.arange(rows, dtype=np.int32), rows, how.grid)
