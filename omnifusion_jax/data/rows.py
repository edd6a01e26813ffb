"""The rows of the batches of a run: each is a stream of its own, so that any process can make any of them.

Row r of a batch of b rows takes the records at r, r + b, r + 2b, ... of the order. How it goes on depends on
these records alone, whatever other rows, workers or hosts do: a bad record is replaced by the next of the
same row, and what waits to be packed waits for the same row.
"""

import dataclasses
from collections.abc import Callable, Sequence

from omnifusion_jax.batch import Outline
from omnifusion_jax.data.omitted import Omitted
from omnifusion_jax.data.order import Order
from omnifusion_jax.data.readers import BadSample, Readers
from omnifusion_jax.errors import DataError

AHEAD = 2  # records of a row that are read before they are needed
IN_VAIN = 1000  # bad records in a row that no luck explains, even in a small set where most are bad


@dataclasses.dataclass
class Row:
    """Where a row is in its records."""

    number: int
    looked: int = 0  # at how many of its records
    asked: int = 0  # how many of its records were asked for
    cut: int = 0  # how many of its dialogues were cut off
    waiting: list[int] = dataclasses.field(default_factory=list)  # positions in the order, oldest first


class Rows:
    """An endless iterator over the plans of batches: for each row the positions of its records.

    Records that are planned, and no others, are left in `readers` to be collected or dropped.

    Args:
      readers: what reads the records.
      order: the index of the record at each position; its length is that of an epoch.
      batch_size: rows of a batch, on all hosts.
      numbers: of the rows that this host makes.
      choose: a packing.Alone or packing.Fullest.
      omitted: decides which records are left out.
    """

    def __init__(
        self,
        readers: Readers,
        order: Order,
        batch_size: int,
        numbers: Sequence[int],
        choose: Callable,
        omitted: Omitted,
    ):
        self.readers, self.order, self.batch_size = readers, order, batch_size
        self.choose, self.omitted = choose, omitted
        self.rows = [Row(number) for number in numbers]

    def __iter__(self):
        return self

    def __next__(self) -> list[list[int]]:
        while wanted := [n for row in self.rows if (n := self.further(row)) is not None]:
            self.ask(wanted)  # a record of every row in turn: those of the first batch come first
        plan = [self.following(row) for row in self.rows]
        self.omitted.end_batch()
        return plan

    def position(self, row, k):
        """Where the k-th record of a row stands in the order."""
        return row.number + k * self.batch_size

    def further(self, row):
        """The position of the next record of a row that should be read; None when enough are."""
        if row.asked - row.looked + len(row.waiting) >= self.choose.window + AHEAD:
            return None
        row.asked += 1
        return self.position(row, row.asked - 1)

    def ask(self, positions):
        self.readers.ask([(n, self.order[n]) for n in positions])

    def following(self, row):
        """The positions of the records that go into the next batch.

        Raises:
          DataError: the row finds nothing but bad records, however far it looks. With records in their own
            order that happens when all that a row takes, every `batch_size`-th, are bad.
        """
        in_vain = 0
        while len(row.waiting) < self.choose.window:
            if row.asked == row.looked:
                self.ask([self.further(row)])
            n = self.position(row, row.looked)
            found = self.readers.look(n)
            row.looked += 1
            self.omitted.looked += 1
            if isinstance(found, BadSample):
                self.readers.drop(n)
                self.omitted.omit(self.order[n], found)
                in_vain += 1
                if in_vain > max(len(self.order), IN_VAIN):
                    raise DataError(
                        f"row {row.number} of the batches finds nothing but bad records. "
                        f"Set data.shuffle, or another batch_size. The last is {found.problem}",
                        found.reason,
                    )
            else:
                row.waiting.append(n)
                in_vain = 0
        sizes = [room_of(self.readers.look(n)) for n in row.waiting]
        chosen = self.choose(sizes)
        plan = [row.waiting[i] for i in chosen]
        row.waiting = [n for i, n in enumerate(row.waiting) if i not in set(chosen)]
        row.cut += sum(self.readers.look(n)[0].cut > 0 for n in plan)
        return plan

    def state(self) -> dict:
        """Where every row is, for JSON: {number: [records looked at, dialogues cut, positions that wait]}."""
        return {str(row.number): [row.looked, row.cut, list(row.waiting)] for row in self.rows}

    def restore(self, state: dict) -> None:
        """Goes on where `state` was taken, on this host or on others that made these rows."""
        for row in self.rows:
            row.looked, row.cut, waiting = state[str(row.number)]
            row.asked, row.waiting = row.looked, list(waiting)
            self.ask(row.waiting)


def room_of(outlines: Sequence[Outline]) -> tuple[int, int]:
    """(tokens, tiles) that a record takes of a row: the most that any of its samples has."""
    tokens = max(sample.length for sample in outlines)
    return tokens, max(sum(sample.tiles.values()) for sample in outlines)
