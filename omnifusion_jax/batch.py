"""The Batch, the only structure that passes from data to models, and how samples are collected into one.

This module needs NumPy alone, so that neither side needs the other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Kinds of position. An UNKNOWN position holds text whose token, as a target, adds nothing to the loss but is
# counted in its mean. A feature row of the stream with number i has the kind FEATURE + i; streams are
# numbered in the order of the model's config.
PADDING, TEXT, UNKNOWN, SPECIAL, FEATURE = range(5)


class Sample(NamedTuple):
    """One laid-out dialogue. The first four arrays have one length."""

    tokens: np.ndarray  # int32: token ids; the padding id where there is no text
    kind: np.ndarray  # int32: TEXT, UNKNOWN, SPECIAL, or FEATURE + the number of a stream
    # int32: which feature row of the stream, or which vector of ModelConfig.special stands here; 0 for text
    index: np.ndarray
    weights: np.ndarray  # float32: loss weight of this token as the target of the position before it
    # {stream: (array for each view)}. Each array holds the tiles of all media items of the stream, one item
    # after the other; those of pictures are uint8[tiles, size, size, 3]. Feature rows are numbered through
    # all tiles.
    media: dict[str, tuple[np.ndarray, ...]]
    items: int = 0  # number of media items; a picture is one
    media_positions: int = 0  # positions that media items take, special vectors among their features included


class Batch(NamedTuple):
    """Laid-out dialogues, padded to one static shape.

    The tiles of media lie in pools. Every pool serves the same number of consecutive rows of the batch, and
    holds their tiles in order. A pool with room to spare ends with blank tiles, which no position points to.
    """

    tokens: np.ndarray  # int32[batch, seq]
    kind: np.ndarray  # int32[batch, seq]; PADDING at the end of a row (in generation: at its start)
    index: np.ndarray  # int32[batch, seq]; feature rows are numbered through the pool
    weights: np.ndarray  # float32[batch, seq]
    segments: np.ndarray  # int32[batch, seq]; 0 is padding, attention stays within a segment
    positions: np.ndarray  # int32[batch, seq], counted from 0 in each segment
    items: np.ndarray  # int32[batch]
    # {stream: (array for each view)}, each [pools, tiles, ...]; those of pictures uint8[..., size, size, 3]
    media: dict[str, tuple[np.ndarray, ...]]


class Tile(NamedTuple):
    """What one tile of a stream is like.

    A media item is cut into one or more tiles of the same shape: a picture into squares (or it is one tile as
    a whole), a video into frames, sound into windows.
    """

    number: int  # of the stream, in the order of the model's config
    shapes: tuple[tuple[int, ...], ...]  # shape of a tile in each view
    dtype: type
    rows: int  # feature rows of a tile


def room(count: int, usual: int, rows: int = 1) -> int:
    """For how many tiles a pool of `rows` rows gets room when it must hold `count`.

    Programs are compiled for each of these sizes, so there are few: 0; `usual` tiles for each of a quarter,
    half or all of the rows; or the last of these, doubled as often as needed.
    """
    if count == 0:
        return 0
    whole = usual * rows
    quarter, half = usual * -(-rows // 4), usual * -(-rows // 2)  # rows are rounded up
    doubled = whole * 2 ** max(0, math.ceil(math.log2(count / whole)))
    return next(size for size in (quarter, half, doubled) if size >= count)


def collate(
    samples: Sequence[Sample],
    length: int,
    tiles: Mapping[str, Tile],
    pools: int | None = None,
    usual: int = 1,
    left: bool = False,
) -> Batch:
    """Collects samples into a Batch, padded to `length` tokens and to equal pools of media.

    Args:
      tiles: {stream: Tile}.
      pools: number of pools, a divisor of the number of samples; None gives each row its own.
      usual: tiles that a row usually has, see `room`.
      left: pads on the left, so that all rows end together, as generation needs it.
    """
    pools = len(samples) if pools is None else pools
    assert len(samples) % pools == 0, f"{len(samples)} rows in {pools} pools"
    shared = len(samples) // pools  # rows per pool
    shape = (len(samples), length)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        kind=np.zeros(shape, np.int32),
        index=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        segments=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        items=np.array([sample.items for sample in samples], np.int32),
        media={name: pooled(samples, name, tile, pools, shared, usual) for name, tile in tiles.items()},
    )
    for row, sample in enumerate(samples):
        n = len(sample.tokens)
        here = np.s_[row, length - n :] if left else np.s_[row, :n]
        for name in ("tokens", "kind", "index", "weights"):
            getattr(batch, name)[here] = getattr(sample, name)
        for name, tile in tiles.items():
            before = sum(tiles_of(other, name) for other in samples[row - row % shared : row])
            of_stream = batch.kind[row] == FEATURE + tile.number
            batch.index[row] += np.where(of_stream, before * tile.rows, 0).astype(np.int32)
        batch.segments[here] = 1
        batch.positions[here] = np.arange(n)
    return batch


def tiles_of(sample: Sample, stream: str) -> int:
    """How many tiles of a stream a sample has."""
    views = sample.media.get(stream, ())
    return len(views[0]) if views else 0


def pooled(samples, stream, tile, pools, shared, usual):
    """The media of a stream in pools of `shared` samples: for each view [pools, tiles, ...]."""
    groups = [samples[i * shared : (i + 1) * shared] for i in range(pools)]
    counts = [sum(tiles_of(sample, stream) for sample in group) for group in groups]
    size = room(max(counts), usual, shared)
    views = tuple(np.zeros((pools, size, *shape), tile.dtype) for shape in tile.shapes)
    for pool, group in enumerate(groups):
        first = 0
        for sample in group:
            for view, given in zip(views, sample.media.get(stream, ()), strict=False):
                view[pool, first : first + len(given)] = given
            first += tiles_of(sample, stream)
    return views
