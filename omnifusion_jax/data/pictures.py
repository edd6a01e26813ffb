"""A picture as a model takes it: the pixels for every encoder, and the order in which its features enter a sequence."""

import dataclasses
from typing import NamedTuple

import numpy as np

from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.images import fit, image_size, open_image, padded
from omnifusion_jax.data.tiles import best_grid, most, tiles, walk


class Picture(NamedTuple):
    views: tuple[np.ndarray, ...]  # for each of ModelConfig.views uint8[tiles, size, size, 3]
    walk: np.ndarray  # int32: feature rows, counted through the tiles, in their order; NEWLINE stands for the vector of that name


@dataclasses.dataclass
class Lens:
    """Anything that `open_image` takes to a Picture, as `config.image` and the encoders' views say. Raises DataError."""

    config: ModelConfig
    max_pixels: int = 50_000_000

    @property
    def room(self):
        """Tiles that a picture takes at most."""
        return most(self.config.image.grids) if self.config.image.fit == "tiles" else 1

    @property
    def slots(self):
        """Positions that a picture takes at most."""
        image, side = self.config.image, self.config.encoder.side
        if image.fit != "tiles":
            return self.config.rows
        return self.config.rows + max(rows * side * (columns * side + image.newline) for rows, columns in image.grids)

    @property
    def sizes(self):
        return tuple(view.size for view in self.config.views)

    def __call__(self, source):
        c, picture = self.config, open_image(source, max_pixels=self.max_pixels)
        if c.image.fit == "tiles":
            return Picture((tiles(picture, c.views[0].size, c.image.grids),), self.order(picture.size))
        views = tuple(fit(picture, view.size, c.image.fit, shortest=view.edge, fill=view.fill)[None] for view in c.views)
        return Picture(views, self.order(picture.size))

    def outline(self, source):
        """The Picture of `source` with tiles of no pixels: all that its place in a sequence depends on, from the header of its file alone.

        Raises DataError for what the header shows. A file that is damaged further on is found out when it is read.
        """
        size = image_size(source, max_pixels=self.max_pixels)
        count = 1
        if self.config.image.fit == "tiles":
            rows, columns = best_grid(size[::-1], self.config.image.grids, self.config.views[0].size)
            count += rows * columns
        elif self.config.image.fit == "pad":
            padded(size)
        return Picture(tuple(np.zeros((count, 0, 0, 3), np.uint8) for _ in self.config.views), self.order(size))

    def order(self, size):
        """The walk of a picture of (width, height) pixels."""
        c = self.config
        if c.image.fit == "tiles":
            return walk(size[::-1], c.image.grids, c.views[0].size, c.encoder.side, newline=c.image.newline, unpad=c.image.unpad)
        return np.arange(c.rows, dtype=np.int32)
