"""What an adapter is, and what several of them share."""

from typing import Protocol

from omnifusion_jax.config import AdapterConfig, StreamConfig
from omnifusion_jax.nn import nnx


class Adapter(Protocol):
    """A module with two steps: `read` runs the encoders, and a call turns the result into embeddings.

    Fresh parameters are drawn by the row of `nn.init.INITS` that `c.adapter.init` names.
    """

    Settings: type[AdapterConfig]  # a dataclass whose `kind` is the name of the row
    encoders: int  # how many encoders the adapter reads

    @staticmethod
    def rows(c: StreamConfig) -> int:
        """Number of embeddings for a media item, or for each tile of one."""

    @staticmethod
    def side(c: StreamConfig) -> int | None:
        """Side of the square grid that the embeddings form, row by row; None if they form no such grid."""

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        """`width` is the embedding width of the decoder."""

    def read(self, encoders, media, remat="none"):
        """Features of the media, in whatever form `__call__` takes.

        `media` holds one array for each encoder; of pictures it is uint8[batch, size, size, 3]. `remat` is
        for the encoders.
        """

    def __call__(self, features, key=None):
        """Embeddings [batch, rows, width] of what `read` returned. A `key` turns dropout on."""


class OfOneEncoder:
    """Reads the features of one encoder. Unless a subclass says otherwise, each row becomes an embedding."""

    encoders = 1

    @staticmethod
    def rows(c: StreamConfig) -> int:
        return c.encoders[0].rows

    @staticmethod
    def side(c: StreamConfig) -> int | None:
        encoder = c.encoders[0]
        return None if encoder.keep_class_token or encoder.budget else encoder.side

    def read(self, encoders, media, remat="none"):
        return encoders[0](media[0], remat)
