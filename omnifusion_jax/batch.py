"""The Batch, the only structure that passes from data to models, and how samples are collected into one.

This module needs NumPy alone, so that neither side needs the other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Kinds of position. An UNKNOWN position holds text whose token, as a target, adds nothing to the loss but is
# counted in its mean; an INSTEAD position holds text that as a target counts as another token. A feature row
# of the stream with number i has the kind FEATURE + i; streams are numbered in the order of the model's
# config.
PADDING, TEXT, UNKNOWN, INSTEAD, SPECIAL, FEATURE = range(6)
# The last byte of a patch of a picture of any shape, which comes as uint8[patches, 3 * patch**2 + 1]; 0 means
# that there is no patch. A picture of 2 x 3 patches with room for 8 has 1 1 2 1 1 2 0 0.
PATCH, LINE_END = 1, 2


class Sample(NamedTuple):
    """One laid-out dialogue, or several that show the same media. The first four arrays have one length."""

    tokens: np.ndarray  # int32: token ids; the padding id where there is no text
    kind: np.ndarray  # int32: TEXT, UNKNOWN, INSTEAD, SPECIAL, or FEATURE + the number of a stream
    # int32: which feature row of the stream, or which vector of ModelConfig.special stands here; the token
    # that counts INSTEAD; 0 for other text
    index: np.ndarray
    weights: np.ndarray  # float32: loss weight of this token as the target of the position before it
    # {stream: (array for each view)}. Each array holds the tiles of all media items of the stream, one item
    # after the other; those of pictures are uint8[tiles, size, size, 3]. Feature rows are numbered through
    # all tiles.
    media: dict[str, tuple[np.ndarray, ...]]
    items: int = 0  # number of media items; a picture is one
    media_positions: int = 0  # positions that media items take, special vectors among their features included
    cut: int = 0  # turns that were cut off at the end because the dialogue was too long
    # positions of each of several dialogues, one after the other: they become segments of their own; (): one
    parts: tuple[int, ...] = ()
    # {name: float32}: further columns of the same length, which an objective has a use for
    extra: dict[str, np.ndarray] = {}  # noqa: RUF012  nobody writes into it


class Outline(NamedTuple):
    """How much room a Sample takes."""

    length: int  # positions
    tiles: dict[str, int]  # {stream: tiles}
    items: int
    cut: int
    segments: int = 1
    extra: tuple[str, ...] = ()  # names of further columns


class Batch(NamedTuple):
    """Laid-out dialogues, one or more a row, padded to one static shape.

    The tiles of media lie in pools. Every pool serves the same number of consecutive rows of the batch, and
    holds their tiles in order. A pool with room to spare ends with blank tiles, which no position points to.
    """

    tokens: np.ndarray  # int32[batch, seq]
    kind: np.ndarray  # int32[batch, seq]; PADDING at the end of a row
    index: np.ndarray  # int32[batch, seq]; feature rows are numbered through the pool
    weights: np.ndarray  # float32[batch, seq]
    # int32[batch, seq]; dialogues of a row from 1 on, 0 is padding; attention stays within
    segments: np.ndarray
    positions: np.ndarray  # int32[batch, seq], counted from 0 in each segment
    items: np.ndarray  # int32[batch]
    # {stream: (array for each view)}, each [pools, tiles, ...]; those of pictures uint8[..., size, size, 3]
    media: dict[str, tuple[np.ndarray, ...]]
    # {name: float32[batch, seq]}: what samples hold under this name; 0 where one does not
    extra: dict[str, np.ndarray] = {}  # noqa: RUF012  nobody writes into it


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


class Form(NamedTuple):
    """The shapes of a Batch."""

    rows: int
    length: int
    pools: int
    room: dict[str, int]  # {stream: tiles of a pool}
    extra: tuple[str, ...] = ()  # names of further columns


class Place(NamedTuple):
    """Where a Sample stands in a Batch."""

    row: int
    start: int  # its first position
    stop: int  # where the next sample of the row begins, or the row ends
    segment: int  # its number in the row, from 1 on; of several, that of the first
    pool: int
    first: dict[str, int]  # {stream: the tile of the pool with which its own begin}


def outline(sample: Sample) -> Outline:
    """The Outline of a Sample."""
    tiles = {stream: len(views[0]) for stream, views in sample.media.items()}
    segments = max(1, len(sample.parts))
    return Outline(len(sample.tokens), tiles, sample.items, sample.cut, segments, tuple(sorted(sample.extra)))


def collate(
    rows: Sequence[Sample | Sequence[Sample]],
    length: int,
    tiles: Mapping[str, Tile],
    pools: int | None = None,
    usual: int = 1,
) -> Batch:
    """Collects samples into a Batch, padded to `length` tokens and to equal pools of media.

    Args:
      rows: the samples of each row, or its only one.
      tiles: {stream: Tile}.
      pools: number of pools, a divisor of the number of rows; None gives each row its own.
      usual: tiles that a row usually has, see `room`.
    """
    rows = [[row] if isinstance(row, Sample) else row for row in rows]
    form, places = arrange([list(map(outline, row)) for row in rows], length, tiles, pools, usual)
    batch = over(form, tiles, np.zeros(size(form, tiles), np.uint8))
    for row, of_row in zip(rows, places, strict=True):
        batch.items[of_row[0].row] = sum(sample.items for sample in row)
        for sample, place in zip(row, of_row, strict=True):
            put(batch, sample, place, tiles)
    return batch


def arrange(
    rows: Sequence[Sequence[Outline]],
    length: int,
    tiles: Mapping[str, Tile],
    pools: int | None = None,
    usual: int = 1,
) -> tuple[Form, list[list[Place]]]:
    """The Form of a Batch and the Place of each sample; arguments as in `collate`."""
    pools = len(rows) if pools is None else pools
    assert len(rows) % pools == 0, f"{len(rows)} rows in {pools} pools"
    shared = len(rows) // pools  # rows per pool
    places, most = [], dict.fromkeys(tiles, 0)
    for number, row in enumerate(rows):
        if number % shared == 0:
            first = dict.fromkeys(tiles, 0)
        start, of_row, segment = 0, [], 1
        for i, sample in enumerate(row, 1):
            stop = length if i == len(row) else start + sample.length
            of_row.append(Place(number, start, stop, segment, number // shared, dict(first)))
            start, segment = start + sample.length, segment + sample.segments
            for stream in tiles:
                first[stream] += sample.tiles.get(stream, 0)
                most[stream] = max(most[stream], first[stream])
        places.append(of_row)
    rooms = {stream: room(count, usual, shared) for stream, count in most.items()}
    names = {name for row in rows for sample in row for name in sample.extra}
    return Form(len(rows), length, pools, rooms, tuple(sorted(names))), places


def over(form: Form, tiles: Mapping[str, Tile], memory: Any) -> Batch:
    """A Batch whose arrays lie in `memory`, a buffer of at least `size(form, tiles)` bytes, as it is."""
    offset, arrays = 0, []
    for shape, dtype in shapes(form, tiles):
        arrays.append(np.frombuffer(memory, dtype, math.prod(shape), offset).reshape(shape))
        offset += aligned(arrays[-1].nbytes)
    return assembled(arrays, tiles, form.extra)


def assembled(arrays: Sequence[Any], tiles: Mapping[str, Tile], extra: Sequence[str] = ()) -> Batch:
    """A Batch of the arrays that `shapes` lists, with further columns of these names."""
    rest = iter(arrays[COLUMNS + 1 :])
    media = {stream: tuple(next(rest) for _ in tile.shapes) for stream, tile in tiles.items()}
    return Batch(*arrays[: COLUMNS + 1], media, {name: next(rest) for name in extra})


def clear(batch: Batch, rows: Sequence[Sequence[Outline]]) -> None:
    """Makes padding of what the memory of a Batch held where none of these samples will be `put`."""
    for stream, views in batch.media.items():
        for view in views:
            shared = len(rows) // len(view)  # rows per pool
            for pool, room in enumerate(view):
                of_pool = [sample for row in rows[pool * shared : (pool + 1) * shared] for sample in row]
                room[sum(sample.tiles.get(stream, 0) for sample in of_pool) :] = 0


COLUMNS = 6  # arrays of a batch that are [batch, seq]


def shapes(form, tiles):
    """The (shape, type) of each array of a Batch, in order."""
    found = [((form.rows, form.length), np.int32)] * COLUMNS + [((form.rows,), np.int32)]
    found[3] = ((form.rows, form.length), np.float32)  # weights
    for stream, tile in tiles.items():
        found += [((form.pools, form.room[stream], *shape), tile.dtype) for shape in tile.shapes]
    return found + [((form.rows, form.length), np.float32)] * len(form.extra)


def size(form: Form, tiles: Mapping[str, Tile]) -> int:
    """Bytes of a Batch of this form."""
    return sum(aligned(math.prod(shape) * np.dtype(dtype).itemsize) for shape, dtype in shapes(form, tiles))


def aligned(count):
    """The number of bytes rounded up, so that the next array begins where devices can read it in place."""
    return -(-count // 64) * 64


def put(batch: Batch, sample: Sample, place: Place, tiles: Mapping[str, Tile]) -> None:
    """Writes a sample, padding up to the next, and its media into a Batch.

    `items` of its row are left to the caller.
    """
    n = len(sample.tokens)
    for array in (*batch[:COLUMNS], *batch.extra.values()):
        array[place.row, place.start + n : place.stop] = 0
    here = np.s_[place.row, place.start : place.start + n]
    for name in ("tokens", "kind", "index", "weights"):
        getattr(batch, name)[here] = getattr(sample, name)
    for name, column in batch.extra.items():
        column[here] = sample.extra.get(name, 0.0)
    parts = sample.parts or (n,)
    batch.segments[here] = place.segment + np.repeat(np.arange(len(parts)), parts)
    batch.positions[here] = np.concatenate([np.arange(part) for part in parts])
    for stream, tile in tiles.items():
        first = place.first[stream]
        batch.index[here][sample.kind == FEATURE + tile.number] += first * tile.rows
        for view, given in zip(batch.media[stream], sample.media.get(stream, ()), strict=False):
            view[place.pool, first : first + len(given)] = given
