"""Media as the features that frozen encoders made of them: how a file holds them, and what reads them.

`prepare_data --features` writes such files. Their dataset.json says what made them:

    {"compute_dtype", "draft", "streams": {name: every setting of its media, and "encoders": [settings of
     each, "shape" of the features of a tile, "weights", a hash of them]}}
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Self

import ml_dtypes  # noqa: F401  NumPy knows bfloat16 by it
import msgpack
import numpy as np

from omnifusion_jax.batch import Tile
from omnifusion_jax.data.modality import Prepared
from omnifusion_jax.errors import DataError
from omnifusion_jax.nested import flat


def unlike(then: dict, now: dict) -> list[str]:
    """Lines that say in which settings two dicts, as JSON gives them, differ."""
    then, now = flat(then), flat(now)
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    return [f"{name} {then.get(name)!r}, now {now.get(name)!r}" for name in names]


class Features(bytes):
    """The features of a media item as a file holds them: the source of a Media."""

    @classmethod
    def of(cls, order: np.ndarray, arrays: Sequence[np.ndarray]) -> Self:
        """Of a Prepared's `order`, and what each encoder gave, [tiles, rows, width]."""
        order = order.astype("<i4", copy=False)
        return cls(msgpack.packb([order.tobytes(), [a.tobytes() for a in arrays]]))


@dataclasses.dataclass
class FeatureProcessor:
    """Gives the features of a media item as a Prepared, with one view for each encoder. Raises DataError."""

    like: Any  # what prepares the media themselves, which are laid out in the same way
    shapes: tuple[tuple[int, int], ...]  # of the features of a tile: (rows, width) for each encoder
    dtype: np.dtype

    @classmethod
    def of(cls, like, made: dict, stream: str) -> Self:
        """Of the processor of a stream's media, and what dataset.json says of its features."""
        shapes = tuple(tuple(encoder["shape"]) for encoder in made["streams"][stream]["encoders"])
        return cls(like, shapes, np.dtype(made["compute_dtype"]))

    @property
    def room(self) -> int:
        return self.like.room

    @property
    def positions(self) -> int:
        return self.like.positions

    def tile(self, number: int) -> Tile:
        return self.like.tile(number)._replace(shapes=self.shapes, dtype=self.dtype)

    def tile_bytes(self) -> int:
        """Bytes of the features of a tile."""
        return sum(map(math.prod, self.shapes)) * self.dtype.itemsize

    def __call__(self, source) -> Prepared:
        if not isinstance(source, Features):
            raise DataError(f"a {type(source).__name__} stands where features were expected", "media")
        try:
            order, arrays = msgpack.unpackb(source)
            order = np.frombuffer(order, "<i4")
            views = tuple(
                np.frombuffer(a, self.dtype).reshape(-1, *shape)
                for a, shape in zip(arrays, self.shapes, strict=True)
            )
        except (ValueError, TypeError):
            raise DataError("its features are damaged, or those of other encoders", "damaged") from None
        return Prepared(views, order, len(views[0]) * self.like.tile(0).rows)

    def outline(self, source) -> Prepared:
        """The same with features of no rows."""
        made = self(source)
        return made._replace(views=tuple(view[:, :0] for view in made.views))
