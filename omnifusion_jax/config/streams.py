"""The configs of streams: what turns media items of one kind into token embeddings."""

import dataclasses
import typing

from omnifusion_jax.config.base import check, one_of
from omnifusion_jax.config.encoder import EncoderConfig
from omnifusion_jax.tables import ADAPTERS


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class AdapterConfig:
    """What turns features into token embeddings.

    Each row of `tables.ADAPTERS` has a subclass, its `Settings`, with fields of its own.
    """

    # a row of tables.ADAPTERS: linear, mlp, transformer, resampler; of two encoders concat, sum, attention
    kind: str = ""
    # fresh kernels: N(0, 1/fan_in), biases 0; "torch": PyTorch's defaults, biases too
    init: str = "normal"

    def validate(self, stream: "StreamConfig", width: int):
        """Raises ConfigError if this adapter cannot join a stream's encoders and a decoder of `width`."""
        one_of("adapter.init", self.init, ("normal", "torch"))
        row = ADAPTERS[self.kind]
        names = lambda cls: {field.name for field in dataclasses.fields(cls)}
        # compared by name: a config file that is read twice defines its classes twice
        own = names(type(self)) == names(row.Settings)
        check(
            own,
            f"adapter.kind {self.kind!r} has settings of its own: "
            f"image.adapter is to be adapter({self.kind!r}, ...)",
        )
        takes, there = row.encoders, len(stream.encoders)
        check(
            there == takes,
            f"adapter.kind {self.kind!r} takes {takes} of the encoders, "
            f"there {'is' if there == 1 else 'are'} {there}",
        )

    @classmethod
    def of(cls, values):
        """The Settings class of the row that `values["kind"]` names."""
        return ADAPTERS[values.get("kind", "")].Settings


def adapter(kind: str, **settings) -> AdapterConfig:
    """The settings of a row of ADAPTERS: `adapter("mlp", mlp=4096)`."""
    return ADAPTERS[kind].Settings(**settings)


@dataclasses.dataclass
class StreamConfig:
    """Encoders turn each tile of a media item into features; an adapter turns these into token embeddings."""

    # each sees the same media item in its own way
    encoders: tuple[EncoderConfig, ...] = dataclasses.field(default_factory=lambda: (EncoderConfig(),))
    adapter: AdapterConfig = dataclasses.field(default_factory=lambda: adapter("transformer"))
    # layout "template": the token that the template writes where a media item belongs
    token: str = ""

    @property
    def rows(self) -> int:
        """Feature rows of a tile: the token embeddings that the adapter gives."""
        return ADAPTERS[self.adapter.kind].rows(self)

    @property
    def side(self) -> int | None:
        """Rows a side, if the feature rows of a tile form a square grid, line by line; else None."""
        return ADAPTERS[self.adapter.kind].side(self)

    def view(self, encoder: EncoderConfig) -> tuple:
        """How a media item is prepared for an encoder; encoders with equal views share the result."""
        return ()

    @property
    def views(self) -> tuple[tuple, ...]:
        """The different views of the encoders, in their order; a media item is prepared once for each."""
        return tuple(dict.fromkeys(map(self.view, self.encoders)))

    @property
    def special(self) -> tuple[str, ...]:
        """Names of the special vectors that stand among its feature rows."""
        return ()

    def validate(self, width):
        for encoder in self.encoders:
            encoder.validate()
        self.adapter.validate(self, width)


class View(typing.NamedTuple):
    """How a picture is prepared for an encoder; encoders with equal views share the pixels."""

    size: int  # pixels a side
    edge: int  # pixels of the shortest edge before the centre is cut out
    fill: tuple[int, int, int] | None  # image.fit=pad: the RGB colour of the padding
    # image.fit=slices: pixels a side of a patch, and how many patches there may be
    patches: tuple[int, int] | None = None


@dataclasses.dataclass
class ImageConfig(StreamConfig):
    """The stream of pictures, and how these are made the square that an encoder takes."""

    token: str = "<image>"
    # the centre; or pad: to a square, with the mean colour; squash; tiles: the whole picture, squashed, and
    # then its tiles (arXiv 2404.06212); slices: the whole picture and then its slices, each in its own shape
    # (arXiv 2403.11703)
    fit: str = "crop"
    # tiles: the (rows, columns) to choose from
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    # tiles: feature rows of mere padding are left out, and the others follow the order of the whole picture
    unpad: bool = False
    slices: int = 9  # slices: at most so many beside the whole picture
    newline: bool = False  # tiles: a special vector ends each line of that order

    def view(self, encoder: EncoderConfig) -> View:
        """How a picture is prepared for an encoder.

        Padding has the encoder's mean colour, as in LLaVA: it is 0 after normalisation, up to rounding.
        """
        fill = tuple(int(255 * mean) for mean in encoder.mean) if self.fit == "pad" else None
        patches = (encoder.patch, encoder.budget) if self.fit == "slices" else None
        return View(*encoder.view, fill, patches)

    @property
    def special(self):
        return ("newline",) * self.newline

    def validate(self, width):
        super().validate(width)
        one_of("image.fit", self.fit, ("crop", "pad", "squash", "tiles", "slices"))
        pairs = all(isinstance(g, tuple | list) and len(g) == 2 and min(g) > 0 for g in self.grids)
        check(pairs and bool(self.grids), f"image.grids {self.grids} are not pairs of (rows, columns)")
        tiles = self.fit == "tiles"
        ordered = self.unpad or self.newline
        check(tiles or not ordered, "image.unpad and image.newline need image.fit=tiles")
        check(not tiles or len(self.encoders) == 1, "image.fit=tiles works with one encoder")
        budget = [encoder.budget for encoder in self.encoders if encoder.budget]
        check(
            bool(budget) == (self.fit == "slices") and (not budget or len(self.encoders) == 1),
            "image.fit=slices goes with one encoder that takes pictures of any shape (encoder.budget), "
            "and such an encoder with image.fit=slices",
        )
        check(self.slices > 0, f"image.slices is {self.slices}; 1 takes the whole picture alone")
        check(
            not ordered or self.side == self.encoders[0].side,
            "image.unpad and image.newline follow the grid of patches, "
            f"which the rows of adapter.kind {self.adapter.kind!r} "
            "(with encoder.keep_class_token: the class token's) are not",
        )
