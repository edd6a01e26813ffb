"""Rows of several dialogues: filled as well as can be, deterministic, and the same wherever a run goes on."""

import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifusion_jax.batch import PADDING, Outline, Sample
from omnifusion_jax.data.packing import Alone, Fullest
from omnifusion_jax.data.pipeline import Batches, Read, keep, merged
from omnifusion_jax.data.readers import BadSample
from omnifusion_jax.data.rows import room_of
from omnifusion_jax.errors import DataError

SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=7)


@settings(max_examples=300)
@given(sizes=SIZES, room=st.tuples(st.integers(20, 50), st.integers(3, 8)))
def test_no_other_choice_fills_a_row_better(sizes, room):
    chosen = Fullest(8, *room)(sizes)
    total = lambda kept: tuple(sum(sizes[i][k] for i in kept) for k in (0, 1))
    fits = lambda kept: total(kept)[0] <= room[0] and total(kept)[1] <= room[1]
    rest = range(1, len(sizes))
    choices = [(0, *more) for n in range(len(sizes)) for more in itertools.combinations(rest, n)]
    best = max(total(kept) for kept in choices if fits(kept))
    assert chosen[0] == 0 and sorted(set(chosen)) == chosen and fits(chosen)
    assert total(chosen) == best
    # of equal choices that of the oldest: the first in lexical order
    assert tuple(chosen) == min(kept for kept in choices if fits(kept) and total(kept) == best)


def test_by_hand():
    assert Fullest(8, 100, 5)([(50, 1), (30, 1), (45, 1), (20, 1), (5, 0)]) == [0, 1, 3]
    assert Fullest(8, 100, 2)([(50, 1), (30, 1), (45, 1), (20, 1), (5, 0)]) == [0, 2, 4]
    assert Fullest(8, 100, 1)([(50, 1), (30, 1), (45, 1)]) == [0]
    assert Alone()([(50, 1), (30, 1)]) == [0]


class Lengths:
    """Record i has lengths[i] tokens that tell its number and tiles[i] pictures; those in `bad` are bad."""

    fingerprint = "lengths"

    def __init__(self, count=97, bad=(), seed=0):
        rng = np.random.default_rng(seed)
        self.lengths, self.tiles, self.bad = rng.integers(1, 21, count), rng.integers(0, 4, count), bad

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        if i in self.bad:
            raise DataError(f"number {i}: bad", "damaged")
        n, shown = self.lengths[i], int(self.tiles[i])
        tokens = np.full(n, i, np.int32)
        media = {"image": (np.full((shown, 2, 2, 3), i % 251, np.uint8),)}
        return Sample(tokens, tokens * 0 + 1, tokens * 0, np.ones(n, np.float32), media, shown, 0)


def packed(source=None, rows=8, window=6, **settings):
    settings = {"on_bad_sample": "skip", "bad_share": 0.2, "seed": 1} | settings
    return Batches(
        source or Lengths(),
        keep,
        batch_size=rows,
        length=50,
        tiles=tiny.tiles(2),
        usual=8,
        pools=4,
        choose=Fullest(window, 50, 8),
        **settings,
    )


def records(batch):
    """For each row the number of the record in each of its segments."""
    found = []
    for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
        of_row = [np.unique(tokens[segments == s]).tolist() for s in range(1, segments.max() + 1)]
        assert all(len(one) == 1 for one in of_row)  # no record in two segments
        found.append([one[0] for one in of_row])
    return found


def bytes_of(batch):
    return [a.tobytes() for a in jax.tree.leaves(batch)]


def test_records_of_several_rows_take_the_room_of_their_largest():
    outlines = [Outline(3, {"image": 4}, 1, 0), Outline(9, {"image": 1, "audio": 2}, 1, 0)]
    assert room_of(outlines) == room_of(outlines[::-1]) == (9, 4)


def test_what_a_packed_batch_holds():
    source = Lengths()
    batch = next(packed(source))
    for row, held in enumerate(records(batch)):
        assert len(held) > 1
        assert batch.items[row] == sum(source.tiles[i] for i in held) <= 8
        segments = batch.segments[row]
        n = sum(source.lengths[i] for i in held)
        assert (segments[:n] > 0).all() and not segments[n:].any() and (np.diff(segments[:n]) >= 0).all()
        assert ((batch.kind[row] == PADDING) == (segments == 0)).all()
        for segment, i in enumerate(held, 1):
            assert batch.positions[row][segments == segment].tolist() == list(range(source.lengths[i]))
    pools = batch.media["image"][0]
    assert pools.shape == (4, 16, 2, 2, 3)
    for pool in range(4):
        held = [
            i for row in records(batch)[2 * pool : 2 * pool + 2] for i in row for _ in range(source.tiles[i])
        ]
        assert pools[pool, :, 0, 0, 0].tolist() == held + [0] * (16 - len(held))


def test_a_row_takes_each_of_its_records_once():
    """A row's records are every eighth of the order. None is lost, none comes twice, none waits for ever."""
    batches, taken = packed(shuffle=False), [[] for _ in range(8)]
    for _ in range(60):
        for row, held in enumerate(records(next(batches))):
            taken[row] += held
    for row, (looked, cut, waiting) in enumerate(batches.state()["rows"].values()):
        mine = [n % 97 for n in range(row, 8 * looked, 8)]
        assert sorted(mine) == sorted([*taken[row], *(n % 97 for n in waiting)])
        assert looked > 97 and cut == 0 and len(waiting) < 6
    assert batches.seen > 8 * 97


def test_it_fills_rows():
    batches = packed(Lengths(1000), window=12)
    filled = np.mean([(next(batches).segments > 0).mean() for _ in range(20)])
    assert filled > 0.99


class Gather:
    """Hosts that are threads: each gives something, and gets what all have given, as JSON has it."""

    def __init__(self, count):
        self.given, self.met, self.left = {}, threading.Barrier(count), threading.Barrier(count)

    def __call__(self, thing):
        self.given[threading.get_ident()] = json.loads(json.dumps(thing))
        self.met.wait(20)
        found = [self.given[host] for host in sorted(self.given)]
        self.left.wait(20)
        return found


@pytest.mark.parametrize("choose", ["packed", "one a row"])
def test_batches_are_the_same_for_all_workers_hosts_and_stops(choose):
    """Byte for byte, with bad records among them."""

    def make(**settings):
        source = Lengths(bad={3, 50, 51, 80})
        if choose == "packed":
            return packed(source, **settings)
        return Batches(
            source,
            keep,
            batch_size=8,
            length=50,
            tiles=tiny.tiles(2),
            usual=3,
            pools=4,
            seed=1,
            on_bad_sample="skip",
            bad_share=0.2,
            **settings,
        )

    whole_run = make()
    whole = [next(whole_run) for _ in range(9)]
    expected = list(map(bytes_of, whole))
    assert len(set(map(tuple, expected))) == 9 and whole_run.skipped >= 2

    workers = make(num_workers=3)
    assert [bytes_of(next(workers)) for _ in range(3)] == expected[:3]
    state = workers.state()
    workers.close()
    resumed = make(num_workers=1)
    resumed.restore(json.loads(json.dumps(state)))
    assert [bytes_of(next(resumed)) for _ in range(2)] == expected[3:5]
    state = resumed.state()
    resumed.close()
    for count in (1, 2, 4):  # each goes on where the hosts before it stopped
        gather = Gather(count)
        hosts = [make(numbers=part.tolist(), gather=gather) for part in np.split(np.arange(8), count)]
        for host in hosts:
            host.restore(json.loads(json.dumps(state)))
        for n in range(5, 8):
            with ThreadPoolExecutor(count) as pool:
                parts = list(pool.map(next, hosts))
            assert bytes_of(jax.tree.map(lambda *a: np.concatenate(a), *parts)) == expected[n], (count, n)
            assert all(host.state()["bad"] == hosts[0].state()["bad"] for host in hosts)
        after = merged([host.state() for host in hosts])
        assert after["rows"].keys() == state["rows"].keys()
    assert after["rows"] == advanced(make, state, 3)


def advanced(make, state, steps):
    """The rows of a run that goes on from `state` for so many steps."""
    batches = make()
    batches.restore(state)
    for _ in range(steps):
        next(batches)
    return batches.state()["rows"]


def test_a_window_is_filled_from_few_good_records():
    batches = packed(Lengths(10, bad=set(range(9))), bad_share=0.9, window=12)
    for _ in range(3):
        assert {i for row in records(next(batches)) for i in row} == {9}


def test_what_does_not_fit_a_row_is_a_bad_sample():
    class Wide(Lengths):
        def __init__(self):
            super().__init__()
            self.tiles[5] = 9

    batches = packed(Wide())
    for _ in range(30):
        next(batches)
    assert batches.left_out() == ["left out: record 5: 9 tiles of media, but data.row_tiles is 8"]


def test_the_largest_row_of_a_record_must_fit():
    source = Lengths()
    source.tiles[:3] = 0, 8, 9
    several = lambda sample: [source[0], sample]
    read = Read([source[1], source[2]], several, room=8)
    assert [len(one.media["image"][0]) for one in read(0)] == [0, 8]
    assert read(1) == BadSample("record 1: 9 tiles of media, but data.row_tiles is 8", "tiles")
    assert len(Read([source[2]], several)(0)) == 2  # without rows that are packed there is no limit
