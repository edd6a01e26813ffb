"""A picture as a model takes it: the pixels for every encoder, and the order in which its features enter a sequence."""

import dataclasses
from typing import NamedTuple

import numpy as np

from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.images import fit, open_image
from omnifusion_jax.data.tiles import most, tiles, walk


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
        return tuple(size for size, _ in self.config.views)

    def __call__(self, source):
        c, picture = self.config, open_image(source, max_pixels=self.max_pixels)
        if c.image.fit == "tiles":
            (size, _), grids = c.views[0], c.image.grids
            order = walk(picture.size[::-1], grids, size, c.encoder.side, newline=c.image.newline, unpad=c.image.unpad)
            return Picture((tiles(picture, size, grids),), order)
        views = tuple(fit(picture, size, c.image.fit, shortest=shortest, fill=mean_colour(c.encoder.mean))[None] for size, shortest in c.views)
        return Picture(views, np.arange(c.rows, dtype=np.int32))


def mean_colour(mean):
    """What padding is filled with, so that it is 0 once normalised."""
    return tuple(int(255 * x) for x in mean)
