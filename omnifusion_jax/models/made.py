"""What stands for an encoder whose features were made beforehand."""

from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.nn import nnx


class Made(nnx.Module):
    """An Encoder without parameters, whose media are the features that it would give."""

    def __init__(self, c: EncoderConfig):
        self.config = c

    def __call__(self, media, remat="none"):  # [batch, rows, width]
        return media

    def fold(self, media, each, start, items=None, skip=0, remat="none"):
        """Raises ConfigError: hidden states are not there."""
        c = self.config
        values = (c.layers + 1 - skip) * c.rows * c.width
        raise ConfigError(
            "this adapter reads the hidden states of all layers of an encoder, and only the features that an "
            f"encoder hands on can be made beforehand: {c.rows * c.width:,} numbers a tile, not {values:,}. "
            "Train it from pictures"
        )
