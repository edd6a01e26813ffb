"""Pictures: how records hold them, their pixels for every encoder, the order of their feature rows."""

import dataclasses
from typing import Self

import numpy as np

from omnifusion_jax.batch import Tile
from omnifusion_jax.config import ImageConfig, View
from omnifusion_jax.config.base import check
from omnifusion_jax.data.images import fit, image_size, open_image, padded
from omnifusion_jax.data.modality import NEXT, Modality, Prepared, first_given
from omnifusion_jax.data.slices import SliceProcessor
from omnifusion_jax.data.tiles import best_grid, most, order, tiles
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES


@dataclasses.dataclass
class ImageProcessor:
    """Turns any source that `open_image` takes into a Prepared picture. Raises DataError.

    It keeps only what it needs of a model's config, because worker processes do without JAX.
    """

    views: tuple[View, ...]
    fit: str
    grids: tuple[tuple[int, int], ...]
    unpad: bool
    newline: bool
    rows: int  # feature rows of one tile
    side: int | None  # rows a side of the square grid that they form, None if they form none
    max_pixels: int = 50_000_000
    draft: bool = False  # large JPEG files are decoded at a part of their size

    @classmethod
    def of(cls, c: ImageConfig, max_pixels: int = 50_000_000, draft: bool = False) -> Self:
        """The processor of an ImageConfig. Raises ConfigError for what cannot go together."""
        check(
            not (draft and c.fit == "tiles"), "data.draft shrinks pictures, image.fit=tiles shows them large"
        )
        return cls(c.views, c.fit, c.grids, c.unpad, c.newline, c.rows, c.side, max_pixels, draft)

    @property
    def room(self) -> int:
        """The largest number of tiles of a picture."""
        return most(self.grids) if self.fit == "tiles" else 1

    @property
    def positions(self) -> int:
        """The largest number of positions that a picture takes in a sequence."""
        if self.fit != "tiles":
            return self.rows
        newlines = self.side if self.newline else 0  # for each row of tiles
        return self.rows + max(rows * columns * self.rows + rows * newlines for rows, columns in self.grids)

    def tile(self, number: int) -> Tile:
        """What batches need to know of its tiles; `number` is that of the stream."""
        return Tile(number, tuple((view.size, view.size, 3) for view in self.views), np.uint8, self.rows)

    def __call__(self, source) -> Prepared:
        draft = max(view.edge or view.size for view in self.views) if self.draft else None
        picture = open_image(source, max_pixels=self.max_pixels, draft=draft)
        if self.fit == "tiles":
            return self.prepared((tiles(picture, self.views[0].size, self.grids),), picture.size)
        views = tuple(
            fit(picture, view.size, self.fit, shortest=view.edge, fill=view.fill)[None] for view in self.views
        )
        return self.prepared(views, picture.size)

    def outline(self, source) -> Prepared:
        """The same with tiles of 0 x 0 pixels, from the file's header alone: enough to lay out a sequence.

        Raises:
          DataError: the header shows that `source` cannot be used. It does not show damage further on.
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
        """The tiles of a picture of (width, height) pixels with the order of their feature rows."""
        rows = len(views[0]) * self.rows
        if not (self.newline or self.unpad):
            return Prepared(views, np.arange(rows, dtype=np.int32), rows)
        by_line = order(size[::-1], self.grids, self.views[0].size, self.side, self.newline, self.unpad)
        return Prepared(views, by_line, rows)


class Pictures:
    """What prepares the pictures of a stream."""

    @staticmethod
    def of(c: ImageConfig, **settings) -> ImageProcessor | SliceProcessor:
        """The processor of an ImageConfig. Raises ConfigError for what cannot go together."""
        return (SliceProcessor if c.fit == "slices" else ImageProcessor).of(c, **settings)


def image_url_part(part, where):
    found = part.get("image_url")
    found = found.get("url") if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise DataError(
            f"{where} has no string 'url' in its 'image_url': a file's name, or a data URL", "part"
        )
    return found


def image_part(part, where):
    return first_given(part, ("image", "path", "url"), NEXT)


MODALITIES["image"] = Modality(
    mark="<image>",
    keys=("image", "images"),
    parts={"image_url": image_url_part, "image": image_part},
    processor=Pictures,
)
