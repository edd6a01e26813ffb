"""What an adapter is, and what several of them share."""

from typing import Protocol

from omnifusion_jax.config import AdapterConfig, StreamConfig


class Adapter(Protocol):
    """A module with two steps: `read` takes from the encoders what it needs, and calling it on that gives embeddings.

    Fresh parameters are drawn by the row of `nn.init.INITS` that `c.adapter.init` names.
    """

    Settings: type[AdapterConfig]  # a dataclass; `kind` is the name of the row
    encoders: int  # how many it reads

    @staticmethod
    def rows(c: StreamConfig) -> int:
        """Embeddings of an item, or of each part of one."""

    @staticmethod
    def side(c: StreamConfig) -> int | None:
        """They are those of a square grid so many a side, line by line; None: they are none of a grid."""

    def __init__(self, c: StreamConfig, width, *, rngs):
        """`width` of the embeddings."""

    def read(self, encoders, media):
        """`media` holds one array for each encoder, uint8[batch, size, size, 3] of pictures."""

    def __call__(self, features, key=None):
        """What `read` gives to [batch, rows, width]. A `key` turns dropout on."""


class OfOneEncoder:
    """Reads the features of one encoder, and gives a row for each."""

    encoders = 1

    @staticmethod
    def rows(c: StreamConfig):
        return c.encoders[0].rows

    @staticmethod
    def side(c: StreamConfig):
        return None if c.encoders[0].keep_class_token else c.encoders[0].side

    def read(self, encoders, media):
        return encoders[0](media[0])
