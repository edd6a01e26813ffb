"""Streams of media: what turns items of one kind into token embeddings."""

import dataclasses
import typing

from omnifusion_jax.config.base import check, one_of
from omnifusion_jax.config.encoder import EncoderConfig
from omnifusion_jax.tables import ADAPTERS


@dataclasses.dataclass(unsafe_hash=True)  # modules carry it as static data
class AdapterConfig:
    """What turns features into token embeddings. A row of `tables.ADAPTERS` has `Settings` of its own beside these."""

    kind: str = ""  # a row of tables.ADAPTERS: linear, mlp, transformer, resampler; of two encoders concat, sum, attention
    init: str = "normal"  # fresh kernels: N(0, 1/fan_in), biases 0; "torch": PyTorch's defaults, biases too

    def validate(self, stream, width):
        """Raises ConfigError where a StreamConfig and a decoder of `width` cannot be joined so."""
        one_of("adapter.init", self.init, ("normal", "torch"))
        row = ADAPTERS[self.kind]
        names = lambda cls: {field.name for field in dataclasses.fields(cls)}
        own = names(type(self)) == names(
            row.Settings
        )  # by name: a config file that is read twice makes its rows twice
        check(
            own,
            f"adapter.kind {self.kind!r} has settings of its own: image.adapter is to be adapter({self.kind!r}, ...)",
        )
        takes, there = row.encoders, len(stream.encoders)
        check(
            there == takes,
            f"adapter.kind {self.kind!r} takes {takes} of the encoders, there {'is' if there == 1 else 'are'} {there}",
        )

    @classmethod
    def of(cls, values):
        """The Settings of the row that `kind` names."""
        return ADAPTERS[values.get("kind", "")].Settings


def adapter(kind, **settings):
    """The settings of a row of ADAPTERS: `adapter("mlp", mlp=4096)`."""
    return ADAPTERS[kind].Settings(**settings)


@dataclasses.dataclass
class StreamConfig:
    """Encoders turn an item, or each part of one, into features, an adapter turns those into token embeddings."""

    # each sees the same item in its own way
    encoders: tuple[EncoderConfig, ...] = dataclasses.field(default_factory=lambda: (EncoderConfig(),))
    adapter: AdapterConfig = dataclasses.field(default_factory=lambda: adapter("transformer"))

    @property
    def rows(self):
        """Token embeddings of an item, or of each part of one."""
        return ADAPTERS[self.adapter.kind].rows(self)

    @property
    def side(self):
        """Rows are those of a grid so many a side, line by line; None: they are none of a grid."""
        return ADAPTERS[self.adapter.kind].side(self)

    @property
    def special(self):
        """Names of the trained vectors that stand among its features."""
        return ()

    def validate(self, width):
        for encoder in self.encoders:
            encoder.validate()
        self.adapter.validate(self, width)


class View(typing.NamedTuple):
    """A way of looking at a picture; encoders with equal ones share its pixels."""

    size: int  # pixels a side
    edge: int  # pixels of the shortest edge before the centre is cut out
    fill: tuple[int, int, int] | None  # image.fit=pad: the colour of what is added, RGB


@dataclasses.dataclass
class ImageConfig(StreamConfig):
    """Pictures, and how they come to the square that an encoder takes."""

    # the centre; or pad: to a square, with the mean colour; squash; tiles: the whole, squashed, and then its
    # tiles (arXiv 2404.06212)
    fit: str = "crop"
    # tiles: the (rows, columns) to choose from
    grids: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
    unpad: bool = False  # tiles: features of nothing but padding are left out, and the others stand in the order of the whole picture
    newline: bool = False  # tiles: a trained vector ends each row of that order

    @property
    def views(self):
        """The different ways in which encoders look at a picture, in order: a picture is prepared once for each."""
        return tuple(dict.fromkeys(map(self.view, self.encoders)))

    def view(self, encoder):
        """How one of the encoders looks at a picture. What is padded has its own mean colour, as in LLaVA: 0 once normalised, to rounding."""
        fill = tuple(int(255 * mean) for mean in encoder.mean) if self.fit == "pad" else None
        return View(*encoder.view, fill)

    @property
    def special(self):
        return ("newline",) * self.newline

    def validate(self, width):
        super().validate(width)
        one_of("image.fit", self.fit, ("crop", "pad", "squash", "tiles"))
        pairs = all(isinstance(g, tuple | list) and len(g) == 2 and min(g) > 0 for g in self.grids)
        check(pairs and bool(self.grids), f"image.grids {self.grids} are not pairs of (rows, columns)")
        tiles, ordered = self.fit == "tiles", self.unpad or self.newline
        check(tiles or not ordered, "image.unpad and image.newline need image.fit=tiles")
        check(not tiles or len(self.encoders) == 1, "image.fit=tiles works with one encoder")
        check(
            not ordered or self.side == self.encoders[0].side,
            f"image.unpad and image.newline follow the grid of patches, which the rows of adapter.kind {self.adapter.kind!r} "
            "(with encoder.keep_class_token: the class token's) are not",
        )
