"""What a run reads, and how: everything about its data that follows from the config and the tokenizer."""

from typing import NamedTuple

from omnifusion_jax.batch import Tile
from omnifusion_jax.config import DataConfig, ModelConfig
from omnifusion_jax.data.mixture import Mixture, PrepareEach, open_mixture, prepare_each, shares
from omnifusion_jax.data.order import Share
from omnifusion_jax.data.packing import Alone, Fullest


class Reading(NamedTuple):
    """The data of a run, opened."""

    source: Mixture
    prepare: PrepareEach
    shares: list[Share]
    choose: Alone | Fullest
    length: int  # tokens of a row
    usual: int  # tiles that a row usually has


def open_reading(c: DataConfig, model: ModelConfig, tokenizer, pairs: bool = False) -> Reading:
    """The Reading of a run, of pairs of answers or of dialogues.

    Raises what `open_mixture`, `prepare_each` and `shares` raise.
    """
    source = open_mixture(c, model.image.encoders[0].side)
    prepare = prepare_each(c, model, tokenizer, source.made_by, pairs)
    length, usual = row_room(c, prepare.tiles, prepare.room)
    choose = Fullest(c.window, length, usual) if c.packing else Alone()
    return Reading(source, prepare, shares(c, source), choose, length, usual)


def row_room(c: DataConfig, tiles: dict[str, Tile], most: int) -> tuple[int, int]:
    """What a row has room for: (tokens, the tiles that it usually has). `most` are those of a media item."""
    length = c.row_length or c.max_length
    if not c.packing:
        return length, most
    shown = length // min(tile.rows for tile in tiles.values())
    return length, c.row_tiles or max(shown, most)
