"""How full the rows of a run are, packed and otherwise, estimated from the sizes of all records.

Rows are filled by training's own code, `data.rows`, which is given sizes in place of samples.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from omnifusion_jax.batch import Outline
from omnifusion_jax.config import TrainConfig
from omnifusion_jax.data.mixture import Mixture
from omnifusion_jax.data.omitted import Omitted
from omnifusion_jax.data.order import Order
from omnifusion_jax.data.packing import Fullest
from omnifusion_jax.data.readers import BadSample, alone
from omnifusion_jax.data.reading import Reading
from omnifusion_jax.data.rows import Rows
from omnifusion_jax.data_report.gather import UNTAUGHT, USABLE, Gathered
from omnifusion_jax.tables import OBJECTIVES

LONGER = (1, 2, 4)  # rows that are tried, as multiples of the longest record
ROOMIER = (1.0, 1.25, 1.5, 2.0)  # tiles of a row that are tried, as multiples of what rows hold anyway
NEAR = 0.99  # of the tokens that rows without a limit of tiles hold: more tiles are not worth their room
LEAST, MOST = 1000, 10_000  # dialogues that are put into rows for an estimate
EPOCHS = 10  # gone through at most, of a small set
RECORDS = 50  # of the set for each row of a batch that is filled
BUCKETS = 16  # batches that are sorted by length together


class Fill(NamedTuple):
    """How full rows are, and how many there are, as estimated."""

    row_length: int
    row_tiles: int
    tokens: float  # share of the row's positions that hold a dialogue
    tiles: float  # share of row_tiles that hold a tile of media
    dialogues: float  # a row
    rows: int  # an epoch
    steps: int  # an epoch


class Sizes:
    """Stands for Readers that have read everything: it has the Outline of every record, or a BadSample."""

    def __init__(self, source: Mixture, gathered: Gathered):
        self.source, self.found, self.asked = source, gathered.found, {}

    def ask(self, wanted: Sequence[tuple[int, int]]) -> None:
        for n, index in wanted:
            number, i = self.source.locate(index)
            records = self.found[number].records
            record = records[
                i % len(records)
            ]  # of a source without an end, those looked at stand for the rest
            taken = record["state"] in (USABLE, UNTAUGHT)
            outline = Outline(int(record["tokens"]), {"": int(record["tiles"])}, 0, 0)
            self.asked[n] = [outline] if taken else BadSample("", "")

    def look(self, n: int) -> list[Outline] | BadSample:
        return self.asked[n]

    def drop(self, n: int) -> None:
        del self.asked[n]


class Estimate:
    """Fills rows as a run does; `epoch` is the number of dialogues that it takes in an epoch."""

    def __init__(self, config: TrainConfig, data: Reading, gathered: Gathered):
        self.config, self.data, self.gathered = config, data, gathered
        order = Order(data.shares, config.seed, config.data.shuffle)
        self.order = Cached(order)
        taken = [len(one.taken) / max(1, one.looked) for one in gathered.found]
        shares = zip(data.shares, taken, strict=True)
        self.epoch = sum(share.samples * part for share, part in shares)
        records = np.concatenate([one.taken for one in gathered.found])
        self.most = int(records["tiles"].max(initial=0))  # of a dialogue

    def packed(self, length: int, tiles: int) -> Fill:
        """Rows of so many tokens and tiles, each of several dialogues."""
        enough = min(max(self.epoch, min(EPOCHS * self.epoch, LEAST)), MOST)
        held = np.zeros(3, np.int64)
        # Rows are alike: fewer of them tell as much.
        streams = min(self.config.batch_size, max(1, int(self.epoch) // RECORDS))
        rows, count = self.rows(Fullest(self.config.data.window, length, tiles), streams), 0
        while held[0] < enough:
            for row in next(rows):
                held += (len(row), *map(sum, zip(*row, strict=True)))
                count += 1
        dialogues = held[0] / count
        an_epoch = math.ceil(self.epoch / dialogues)
        steps = math.ceil(an_epoch / self.config.batch_size)
        full = held[1] / count / length, held[2] / count / tiles
        return Fill(length, tiles, *map(float, full), float(dialogues), an_epoch, steps)

    def rows(self, choose, batch: int) -> Iterator[list[list[tuple[int, int]]]]:
        """For every step of `batch` rows the (tokens, tiles) of the dialogues in each of them."""
        sizes = Sizes(self.data.source, self.gathered)
        settings = {"on_bad": "skip", "on_long": "skip", "bad_share": 1.0, "drawn": False, "gather": alone}
        omitted = Omitted(len(self.data.source), **settings)
        for plan in Rows(sizes, self.order, batch, range(batch), choose, omitted):
            yield [[(one.length, one.tiles[""]) for n in row for one in sizes.look(n)] for row in plan]
            for n in itertools.chain.from_iterable(plan):
                sizes.drop(n)
            omitted.history.clear()

    def suited(self, length: int) -> Fill:
        """Rows of so many tokens, with as few tiles as do not leave many tokens empty."""
        least = max(1, self.most)  # 0 would mean as many as tokens
        best = self.packed(length, max(least, length))
        for more in ROOMIER:
            tried = self.packed(length, max(least, math.ceil(best.tiles * best.row_tiles * more)))
            if tried.tokens >= NEAR * best.tokens:
                return tried
        return best


class Cached:
    """An Order that finds each position once."""

    def __init__(self, order: Order):
        self.order, self.at = order, functools.cache(order.__getitem__)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, n: int) -> int:
        return self.at(n)


def fill(config: TrainConfig, data: Reading, gathered: Gathered) -> dict | None:
    """How full rows are, as report.json has it; None if no record can be used.

        run       the rows of the config, if it packs
        packed    for rows of max_length (of pairs twice that) and its multiples, each with the row_tiles
                  that suit it
        padded    share of tokens, one dialogue or pair a row of that length
        bucketed  the same, if dialogues of like length were batched and padded to the longest of a batch
        steps     of an epoch as the config is

    Rows of `packed` and `run` are the fields of a Fill.
    """
    c, lengths = config.data, np.concatenate([one.taken["tokens"] for one in gathered.found])
    if not len(lengths):
        return None
    estimate = Estimate(config, data, gathered)
    longest = c.max_length * (2 if OBJECTIVES[config.objective].pairs else 1)  # that a record may be
    rows = [estimate.suited(longest * times)._asdict() for times in LONGER]
    run = estimate.packed(data.length, data.usual)._asdict() if c.packing else None
    return {
        "run": run,
        "packed": rows,
        "padded": float(lengths.mean() / longest),
        "bucketed": bucketed(lengths, config.batch_size),
        "steps": run["steps"] if run else math.ceil(estimate.epoch / config.batch_size),
    }


def bucketed(lengths: Sequence[int], batch: int) -> float:
    """The share of positions with tokens, if batches hold dialogues of like length.

    Of every BUCKETS batches dialogues are sorted, and each batch is padded to its longest.
    """
    room = 0
    for start in range(0, len(lengths), batch * BUCKETS):
        ordered = np.sort(lengths[start : start + batch * BUCKETS])
        batches = (ordered[i : i + batch] for i in range(0, len(ordered), batch))
        room += sum(int(one[-1]) * len(one) for one in batches)
    return float(np.sum(lengths, dtype=np.int64) / room)
