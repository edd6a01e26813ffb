"""A picture as a model takes it: the pixels for every encoder, and the order in which its features enter a sequence."""

import dataclasses
from typing import NamedTuple

import numpy as np

from omnifusion_jax.batch import Tile
from omnifusion_jax.config import ImageConfig, View
from omnifusion_jax.data.images import fit, image_size, open_image, padded
from omnifusion_jax.data.tiles import best_grid, most, order, tiles


class Prepared(NamedTuple):
    """A media item as its stream takes it."""

    views: tuple[np.ndarray, ...]  # for each view its tiles, of a picture uint8[tiles, size, size, 3]
    order: (
        np.ndarray
    )  # int32: feature rows, counted through the tiles, as they stand in a sequence; below 0 a special vector
    rows: int  # feature rows of all its tiles


@dataclasses.dataclass
class ImageProcessor:
    """Anything that `open_image` takes to a Prepared picture. Raises DataError.

    It holds what it needs of a model's config and no more: processes that only read have no use for JAX.
    """

    views: tuple[View, ...]
    fit: str
    grids: tuple[tuple[int, int], ...]
    unpad: bool
    newline: bool
    rows: int  # of one tile
    side: int | None  # of the grid that they are
    max_pixels: int = 50_000_000

    @classmethod
    def of(cls, c: ImageConfig, max_pixels=50_000_000):
        return cls(c.views, c.fit, c.grids, c.unpad, c.newline, c.rows, c.side, max_pixels)

    @property
    def room(self):
        """Tiles that a picture takes at most."""
        return most(self.grids) if self.fit == "tiles" else 1

    @property
    def positions(self):
        """Positions that a picture takes at most."""
        if self.fit != "tiles":
            return self.rows
        return self.rows + max(
            rows * columns * self.rows + (rows * self.side if self.newline else 0)
            for rows, columns in self.grids
        )

    def tile(self, number):
        """What batches must know of it."""
        return Tile(number, tuple((view.size, view.size, 3) for view in self.views), np.uint8, self.rows)

    def __call__(self, source):
        picture = open_image(source, max_pixels=self.max_pixels)
        if self.fit == "tiles":
            return self.prepared((tiles(picture, self.views[0].size, self.grids),), picture.size)
        views = tuple(
            fit(picture, view.size, self.fit, shortest=view.edge, fill=view.fill)[None] for view in self.views
        )
        return self.prepared(views, picture.size)

    def outline(self, source):
        """The same with tiles of no pixels: all that its place in a sequence depends on, from the header of its file alone.

        Raises DataError for what the header shows. A file that is damaged further on is found out when it is read.
        """
        size = image_size(source, max_pixels=self.max_pixels)
        count = 1
        if self.fit == "tiles":
            rows, columns = best_grid(size[::-1], self.grids, self.views[0].size)
            count += rows * columns
        elif self.fit == "pad":
            padded(size)
        return self.prepared(tuple(np.zeros((count, 0, 0, 3), np.uint8) for _ in self.views), size)

    def prepared(self, views, size):
        """Of a picture of (width, height) pixels."""
        rows = len(views[0]) * self.rows
        if not (self.newline or self.unpad):
            return Prepared(views, np.arange(rows, dtype=np.int32), rows)
        return Prepared(
            views,
            order(size[::-1], self.grids, self.views[0].size, self.side, self.newline, self.unpad),
            rows,
        )
