"""Records that are left out, and when there are too many of them to go on."""

import collections
import math
from collections.abc import Callable

from omnifusion_jax.data.readers import BadSample
from omnifusion_jax.errors import DataError

SHOWN = 10  # bad records that a message names
WINDOW = 10_000  # records: of so many that follow one another no more than `bad_share` may be bad
SKIP = "data.on_bad_sample=skip leaves such samples out and counts them"
LONG = "data.on_long=skip leaves such dialogues out, data.on_long=cut shortens them; both count them"
TOO_LONG = "too_long"  # the reason of dialogues that do not fit; they count for themselves


def allowed(bad_share: float, records: int) -> int:
    """How many of `records` may be bad."""
    return max(1, math.floor(bad_share * records))


def explained(bad_share: float, read: int) -> int:
    """How many of `read` records, drawn at random, may be bad by chance if `bad_share` of all are.

    These are 4 standard deviations more than expected, and 3 more records for small numbers. Fewer than one
    run in 10,000 is stopped wrongly.
    """
    expected = bad_share * read
    return math.floor(expected + 4 * math.sqrt(expected) + 3)


class Omitted:
    """What is left out of a run, by index. Every host comes to the same decisions after every batch.

    Args:
      records: of the data, in all.
      on_bad: "raise" or "skip".
      on_long: what is done with dialogues that are too long: "raise", "skip", or anything else for the same
        as with other bad ones.
      bad_share: of WINDOW records, or of all if there are fewer.
      drawn: whether the order is a random one, so that few records tell of all.
      gather: gives what each host has given it.
    """

    def __init__(
        self, records: int, *, on_bad: str, on_long: str, bad_share: float, drawn: bool, gather: Callable
    ):
        self.records, self.on_bad, self.on_long = records, on_bad, on_long
        self.bad_share, self.drawn, self.gather = bad_share, drawn, gather
        self.found: dict[int, BadSample | None] = {}  # None: an earlier start of the run met it
        self.too_long = set()  # those of them that are no more than that
        self.looked, self.new = (
            0,
            {},
        )  # records that were looked at since the last batch, and bad ones of them
        self.history = collections.deque()  # [(records looked at, bad ones)] of the last batches

    def omit(self, index: int, bad: BadSample) -> None:
        """Leaves a record out. Raises DataError if none may be, or if there are too many."""
        if bad.reason == TOO_LONG and self.on_long == "raise":
            raise DataError(f"{bad.problem.rstrip('.')}. ({LONG})", bad.reason)
        if self.on_bad == "raise" and not self.is_long(bad):
            raise DataError(f"{bad.problem.rstrip('.')}. ({SKIP})", bad.reason)
        if index not in self.found:
            self.new[index] = bad
            # here too: a row that finds nothing but bad records ends no batch
            self.judge(self.looked, self.new)

    def is_long(self, bad):
        return bad.reason == TOO_LONG and self.on_long == "skip"

    def end_batch(self) -> None:
        """Decides on what all hosts have met for a batch. Raises DataError if that are too many."""
        mine = [[index, *bad] for index, bad in sorted(self.new.items())]
        met = self.gather([self.looked, mine])  # of all hosts
        looked = sum(looked for looked, _ in met)
        new = {index: BadSample(*bad) for _, one in met for index, *bad in one if index not in self.found}
        self.judge(looked, new)
        self.found |= new
        self.too_long |= {index for index, bad in new.items() if self.is_long(bad)}
        self.history.append((looked, sum(not self.is_long(bad) for bad in new.values())))
        while sum(looked for looked, _ in self.history) - self.history[0][0] >= self.window:
            self.history.popleft()
        self.looked, self.new = 0, {}

    @property
    def window(self) -> int:
        """How many of the last records count."""
        return min(self.records, WINDOW)

    @property
    def most(self) -> int:
        """How many of them may be bad."""
        whole = self.window == self.records
        return (allowed if whole else explained)(self.bad_share, self.window)

    def judge(self, looked, new):
        """Raises DataError if the last records, and `new` bad ones among `looked` more, are too many."""
        bad = {index: one for index, one in new.items() if not self.is_long(one)}
        count = sum(bad for _, bad in self.history) + len(bad)
        read = sum(looked for looked, _ in self.history) + looked
        none_left = len(self.found.keys() | new.keys()) >= self.records
        surely = self.drawn and count > explained(self.bad_share, read)
        if count > self.most or surely or none_left:
            known = {index: one for index, one in self.found.items() if one} | new
            shown = "\n  ".join(one.problem for one in list(known.values())[-SHOWN:])
            what = "all records are left out" if none_left else f"{count:,} of {read:,} records are bad"
            raise DataError(f"{what}; {self.limit()}:\n  {shown}")

    def limit(self) -> str:
        """How many bad records are allowed, for messages."""
        which = "all" if self.window == self.records else "any"
        share = f"data.bad_share={self.bad_share:g}"
        return f"of {which} {self.window:,} no more than {self.most:,} may be ({share})"

    def state(self) -> dict:
        """What is known, for JSON. It is cheap: every batch asks for it."""
        return {"bad": list(self.found), "too_long": sorted(self.too_long), "history": list(self.history)}

    def restore(self, state: dict) -> None:
        """Goes on where `state` was taken."""
        self.found = dict.fromkeys(state["bad"])
        self.looked, self.new = 0, {}
        self.too_long = set(state["too_long"])
        self.history = collections.deque(map(tuple, state["history"]))
