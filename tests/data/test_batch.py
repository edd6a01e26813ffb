"""Batches: sizes of pools, and where the media of their rows lie."""

import numpy as np
import pytest
import tiny

from omnifusion_jax.batch import FEATURE, SPECIAL, TEXT, Sample, Tile, collate, room


@pytest.mark.parametrize(
    ("usual", "rows", "sizes"),
    [
        (1, 16, {0: 0, 1: 4, 4: 4, 5: 8, 8: 8, 9: 16, 16: 16, 17: 32, 32: 32, 33: 64}),
        (1, 3, {0: 0, 1: 1, 2: 2, 3: 3, 4: 6, 7: 12}),
        (1, 1, {0: 0, 1: 1, 2: 2, 3: 4, 5: 8}),
        (5, 1, {0: 0, 1: 5, 3: 5, 5: 5, 6: 10, 11: 20}),  # tiles: their number alone changes nothing
        (5, 8, {0: 0, 3: 10, 10: 10, 11: 20, 21: 40, 40: 40, 41: 80}),
    ],
)
def test_a_pool_comes_in_few_sizes(usual, rows, sizes):
    assert {parts: room(parts, usual, rows) for parts in sizes} == sizes
    found = [room(parts, usual, rows) for parts in range(1, usual * rows + 1)]
    assert len(set(found)) <= 3 and found == sorted(found)
    assert all(size >= n for n, size in enumerate(found, 1))


ROWS = 2  # feature rows of a part


def sample(*colours, text=3, views=1):
    """So many parts of one colour each, after a vector and before text."""
    n = ROWS * len(colours)
    kind = np.array([SPECIAL, *[FEATURE] * n, *[TEXT] * text], np.int32)
    index = np.array([1, *range(n), *[0] * text], np.int32)
    pixels = np.array(colours, np.uint8).reshape(-1, 1, 1, 1)
    media = tuple(np.tile(pixels, (1, 4 + view, 4 + view, 3)) for view in range(views))
    tokens, weights = np.arange(len(kind), dtype=np.int32) + 5, np.ones(len(kind), np.float32)
    return Sample(tokens, kind, index, weights, {"image": media} if colours else {}, len(colours), n)


COLOURS = [(1,), (), (2, 3), (4,)]
SAMPLES = [sample(*colours) for colours in COLOURS]
TILES = tiny.tiles(4, rows=ROWS)


def test_several_samples_in_a_row():
    """Pictures of a row are counted together, and its positions begin anew with each sample."""
    batch = collate([SAMPLES[2:], SAMPLES[:1]], 20, TILES, 1)
    assert batch.items.tolist() == [3, 1]
    n, m = (len(one.tokens) for one in SAMPLES[2:])
    assert batch.segments[0].tolist() == [1] * n + [2] * m + [0] * (20 - n - m)
    assert batch.positions[0].tolist() == [*range(n), *range(m), *[0] * (20 - n - m)]
    assert batch.index[0][batch.kind[0] == FEATURE].tolist() == [*range(ROWS * 3)]
    assert batch.index[1][batch.kind[1] == FEATURE].tolist() == [*range(ROWS * 3, ROWS * 4)]


def shades(view):
    """The colour of every part of every pool; 0: blank."""
    return view[:, :, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("pools", "first", "colours"),
    [
        (None, [0, 0, 0, 0], [[1, 0], [0, 0], [2, 3], [4, 0]]),
        (4, [0, 0, 0, 0], [[1, 0], [0, 0], [2, 3], [4, 0]]),
        (2, [0, 0, 0, 4], [[1, 0, 0, 0], [2, 3, 4, 0]]),
        (1, [0, 0, 2, 6], [[1, 2, 3, 4]]),
    ],
)
def test_rows_count_through_the_pool_that_they_share(pools, first, colours):
    batch = collate(SAMPLES, 9, TILES, pools)
    assert shades(batch.media["image"][0]) == colours and batch.items.tolist() == [1, 0, 2, 1]
    for row, given in enumerate(SAMPLES):
        n = len(given.tokens)
        here = slice(n)
        assert batch.kind[row, here].tolist() == given.kind.tolist() and (batch.kind[row] > 0).sum() == n
        moved = np.where(given.kind == FEATURE, given.index + first[row], given.index)
        assert batch.index[row, here].tolist() == moved.tolist()
        assert not batch.index[row][batch.kind[row] == 0].any()
        pool = shades(batch.media["image"][0])[row * len(colours) // 4]
        shown = [pool[i // ROWS] for i in batch.index[row][batch.kind[row] == FEATURE]]
        assert shown == [colour for colour in COLOURS[row] for _ in range(ROWS)]
        assert batch.segments[row, here].all() and batch.positions[row, here].tolist() == list(range(n))


def test_every_view_of_a_picture_lies_at_one_place():
    batch = collate([sample(1, views=2), sample(2, 3, views=2)], 9, tiny.tiles(4, 5, rows=ROWS), pools=1)
    small, large = batch.media["image"]
    assert small.shape == (1, 4, 4, 4, 3) and large.shape == (1, 4, 5, 5, 3)
    assert shades(small) == shades(large) == [[1, 2, 3, 0]]


def test_each_stream_counts_through_tiles_of_its_own():
    """Two rows that share a pool: one of a picture and a sound, one of two sounds."""
    tiles = tiny.tiles(4, rows=ROWS) | {"audio": Tile(1, ((5,),), np.float32, 3)}
    rows = []
    for pictures, sounds in ((1, 1), (0, 2)):
        kind = np.array([FEATURE] * ROWS * pictures + [FEATURE + 1] * 3 * sounds + [TEXT], np.int32)
        index = np.array([*range(ROWS * pictures), *range(3 * sounds), 0], np.int32)
        media = {
            "image": (np.ones((pictures, 4, 4, 3), np.uint8),),
            "audio": (np.ones((sounds, 5), np.float32),),
        }
        media = {name: views for name, views in media.items() if len(views[0])}
        rows.append(Sample(kind, kind, index, kind.astype(np.float32), media))
    batch = collate(rows[::-1], 9, tiles, pools=1)
    assert batch.media["image"][0].shape[:2] == (1, 1) and batch.media["audio"][0].shape == (1, 4, 5)
    assert batch.index[0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0]
    assert batch.index[1].tolist() == [0, 1, 6, 7, 8, 0, 0, 0, 0]
    after = collate(rows, 9, tiles, pools=1)  # sounds after a row with a picture, which does not shift them
    assert after.index[1].tolist() == [3, 4, 5, 6, 7, 8, 0, 0, 0]


def test_without_media_there_is_no_room_for_any():
    batch = collate([sample(), sample()], 9, tiny.tiles(4, 5, rows=ROWS), usual=5)
    assert [view.shape for view in batch.media["image"]] == [
        (2, 0, 4, 4, 3),
        (2, 0, 5, 5, 3),
    ] and not batch.items.any()
    assert collate([sample(), sample()], 9, {}).media == {}


def test_there_is_room_for_what_rows_have_as_a_rule():
    """Sixteen rows: for four, eight or all of them, whichever have a picture of up to five parts."""
    for shown, size in ((1, 20), (4, 20), (5, 40), (9, 80)):
        samples = [sample(*[7] * 5) if i < shown else sample() for i in range(16)]
        assert collate(samples, 20, TILES, pools=1, usual=5).media["image"][0].shape[:2] == (1, size)
