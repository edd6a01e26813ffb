"""Which record stands where in the endless order of a run: a function of the seed and the sizes alone."""

import bisect
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

SMALL = 1 << 16  # records: orders of so many are held in memory, half a megabyte each


class Share(NamedTuple):
    """What a set of data gives to an epoch."""

    records: int  # that it has
    samples: int  # that an epoch takes from it


class Order:
    """The index of the record at each position; those of a later set follow those of the sets before it.

    Every epoch holds `samples` records of each set, all sets shuffled together. A set goes through all its
    records, in a new order each time, before one comes again: an epoch that takes fewer than there are goes
    on in the next epoch where it stopped. Orders of large sets are not held in memory.

    Args:
      shares: one for each set.
      seed: of all the orders; without `shuffle`, sets follow one another as they are.
    """

    def __init__(self, shares: Sequence[Share], seed: int, shuffle: bool = True):
        endless = shuffled if shuffle else in_turn
        self.shares = list(shares)
        self.ends = list(itertools.accumulate(share.samples for share in shares))
        self.first = [0, *itertools.accumulate(share.records for share in shares)]
        self.slots = endless(len(self), seed)
        # A set whose samples are all its records, once or several times, is shuffled by the slots.
        self.within = [
            None if samples % records == 0 else endless(records, seed_of(seed, k))
            for k, (records, samples) in enumerate(shares)
        ]

    def __len__(self) -> int:
        """Records in an epoch."""
        return self.ends[-1]

    def __getitem__(self, n: int) -> int:
        epoch, slot = n // len(self), self.slots(n)
        k = bisect.bisect_right(self.ends, slot)
        draw = slot - (self.ends[k - 1] if k else 0) + epoch * self.shares[k].samples
        record = draw % self.shares[k].records if self.within[k] is None else self.within[k](draw)
        return self.first[k] + record


def seed_of(seed: int, k: int) -> int:
    """A seed of its own for set k."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1)[0])


def in_turn(count: int, seed: int) -> Callable[[int], int]:
    """What stands at position n when `count` things follow one another again and again."""
    return lambda n: n % count


def shuffled(count: int, seed: int) -> Callable[[int], int]:
    """The same, in another order every time."""
    if count > SMALL:
        import grain  # here because it imports JAX, which worker processes do without

        dataset = grain.MapDataset.range(count).seed(seed).shuffle().repeat()
        return lambda n: int(dataset[n])

    @functools.lru_cache(4)
    def order(epoch):
        """Grain's shuffle takes up to a millisecond for each index of a small set; this is ready at once."""
        return np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind="stable")

    return lambda n: int(order(n // count)[n % count])
