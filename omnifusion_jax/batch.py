"""The one structure that crosses from data to models. NumPy only: neither side needs the other."""

import math
from typing import NamedTuple

import numpy as np

# Kinds of position. A feature row of stream number i (as the model's config counts them) is FEATURE + i.
PADDING, TEXT, UNKNOWN, SPECIAL, FEATURE = range(
    5
)  # UNKNOWN: text whose token costs nothing as a target, yet counts


class Sample(NamedTuple):
    """One laid-out dialogue; arrays of one length."""

    tokens: np.ndarray  # int32: token ids, the padding id where no text stands
    kind: np.ndarray  # int32: TEXT, UNKNOWN, SPECIAL, or FEATURE and the number of a stream
    index: (
        np.ndarray
    )  # int32: which feature row of the stream, or which of ModelConfig.special stands here; 0 for text
    weights: np.ndarray  # float32: the loss weight of this token as a target of the position before it
    # by stream, for each of its views the tiles of its items one after the other, of pictures uint8[tiles, size, size, 3];
    # feature rows are counted through them
    media: dict[str, tuple[np.ndarray, ...]]
    items: int = 0  # media items, pictures for one
    media_positions: int = 0  # positions that they take, special vectors among features included


class Batch(NamedTuple):
    """Laid-out dialogues of one static shape.

    Media lie in pools: as many rows of the batch as there are in all, divided by the number of pools, share one, in their
    order. Where they have fewer tiles than there is room for, blank ones follow that no position points to.
    """

    tokens: np.ndarray  # int32[batch, seq]
    kind: np.ndarray  # int32[batch, seq]; PADDING at the end (in generation: at the start) of a row
    index: np.ndarray  # int32[batch, seq]: feature rows are counted through the pool
    weights: np.ndarray  # float32[batch, seq]
    segments: np.ndarray  # int32[batch, seq]; 0 is padding, attention stays within a segment
    positions: np.ndarray  # int32[batch, seq], counted from 0 in each segment
    items: np.ndarray  # int32[batch]
    media: dict[
        str, tuple[np.ndarray, ...]
    ]  # by stream, for each view [pools, tiles, ...], of pictures uint8[..., size, size, 3]


class Tile(NamedTuple):
    """What one tile of a stream's media is like. A media item is cut into tiles of one shape: a picture into one or more."""

    number: int  # of the stream, as the model's config counts them
    shapes: tuple[tuple[int, ...], ...]  # of a tile, for each view
    dtype: type
    rows: int  # feature rows of a tile


def room(count, usual, rows=1):
    """Tiles that a pool of so many rows has room for, of the few sizes that programs are compiled for: none; `usual`
    ones for a quarter of the rows, for half of them, for all; or the last doubled as often as it takes."""
    if count == 0:
        return 0
    whole = usual * rows
    doubled = whole * 2 ** max(0, math.ceil(math.log2(count / whole)))
    return next(size for size in (usual * -(-rows // 4), usual * -(-rows // 2), doubled) if size >= count)


def collate(samples, length, tiles, pools=None, usual=1, left=False):
    """Pads samples to `length` tokens, and to pools of media; on the left for generation: all rows end together.

    Args:
      tiles: {stream: Tile}.
      pools: how many; None: one a row. They divide the samples.
      usual: tiles that a row has as a rule.
    """
    pools = len(samples) if pools is None else pools
    assert len(samples) % pools == 0, f"{len(samples)} rows in {pools} pools"
    shared = len(samples) // pools  # rows a pool
    batch = Batch(
        *(
            np.zeros((len(samples), length), t)
            for t in (np.int32, np.int32, np.int32, np.float32, np.int32, np.int32)
        ),
        np.array([sample.items for sample in samples], np.int32),
        {name: pooled(samples, name, tile, pools, shared, usual) for name, tile in tiles.items()},
    )
    for row, sample in enumerate(samples):
        n = len(sample.tokens)
        here = np.s_[row, length - n :] if left else np.s_[row, :n]
        for name in ("tokens", "kind", "index", "weights"):
            getattr(batch, name)[here] = getattr(sample, name)
        for name, tile in tiles.items():
            before = sum(tiles_of(other, name) for other in samples[row - row % shared : row])
            batch.index[row] += np.where(
                batch.kind[row] == FEATURE + tile.number, before * tile.rows, 0
            ).astype(np.int32)
        batch.segments[here] = 1
        batch.positions[here] = np.arange(n)
    return batch


def tiles_of(sample, stream):
    views = sample.media.get(stream, ())
    return len(views[0]) if views else 0


def pooled(samples, stream, tile, pools, shared, usual):
    """The media of a stream, for each view [pools, tiles, ...]."""
    groups = [samples[i * shared : (i + 1) * shared] for i in range(pools)]
    size = room(max(sum(tiles_of(sample, stream) for sample in group) for group in groups), usual, shared)
    views = tuple(np.zeros((pools, size, *shape), tile.dtype) for shape in tile.shapes)
    for pool, group in enumerate(groups):
        first = 0
        for sample in group:
            for view, given in zip(views, sample.media.get(stream, ()), strict=False):
                view[pool, first : first + len(given)] = given
            first += tiles_of(sample, stream)
    return views
