"""From a source to batches: an order, rows of dialogues, and batches made ahead of their use."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from omnifusion_jax.batch import FEATURE, Batch, Sample, outline
from omnifusion_jax.data import synthetic
from omnifusion_jax.data.ahead import Ahead
from omnifusion_jax.data.omitted import SHOWN, SKIP, Omitted, allowed
from omnifusion_jax.data.order import Order, Share
from omnifusion_jax.data.packing import Alone, Fullest
from omnifusion_jax.data.readers import BadSample, Readers, alone
from omnifusion_jax.data.rows import Rows
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.errors import DataError, OmniFusionError

WAIT = 20  # seconds that the first step waits at most for the check of the data
DEPTH = 2  # batches that are made before they are asked for


def keep(sample: Sample) -> Sample:
    """The `prepare` of sources that already give samples."""
    return sample


@dataclasses.dataclass
class PatchSource:
    """Samples of synthetic pictures for an encoder alone.

    Token i names what stands in the place of patch i, as an index into `synthetic.CELL_WORDS`.
    """

    side: int  # patches a side
    split: str = "train"

    def __len__(self):
        return ENDLESS

    def __getitem__(self, i: int) -> Sample:
        scene, rng = synthetic.scene_and_rng(i, self.split)
        words = synthetic.patch_words(scene, self.side)
        labels = np.array([synthetic.CELL_WORDS.index(word) for word in words], np.int32)
        n = len(labels)
        return Sample(
            tokens=labels,
            kind=np.full(n, FEATURE, np.int32),
            index=np.arange(n, dtype=np.int32),
            weights=np.ones(n, np.float32),
            media={"image": (synthetic.render(scene, rng)[None],)},
            items=1,
            media_positions=n,
        )


@dataclasses.dataclass
class Read:
    """Gives the samples of record `i` of a source, or a BadSample in place of an OmniFusionError.

    Whether to skip is decided in one place.
    """

    source: Any
    prepare: Callable[..., Sample | list[Sample]]
    room: int | None = None  # tiles of media that a row has room for
    tokens: int | None = None  # that a row has room for

    @classmethod
    def of(cls, source: Any, prepare: Callable, choose: Alone | Fullest) -> Self:
        """What reads records for rows that `choose` fills."""
        return cls(source, prepare, getattr(choose, "tiles", None), getattr(choose, "tokens", None))

    def __call__(self, i: int) -> list[Sample] | BadSample:
        try:
            made = self.prepare(self.source[int(i)])
        except OmniFusionError as error:
            return BadSample(str(error), getattr(error, "reason", "other"))
        made = [made] if isinstance(made, Sample) else made
        tiles = max(sum(outline(sample).tiles.values()) for sample in made)
        if self.room is not None and tiles > self.room:
            where = named(self.source)(i)
            return BadSample(f"{where}: {tiles} tiles of media, but data.row_tiles is {self.room}", "tiles")
        longest = max(len(sample.tokens) for sample in made)
        if self.tokens is not None and longest > self.tokens:  # a pair of dialogues that are short enough
            where = named(self.source)(i)
            problem = f"{where}: {longest} tokens together, but data.row_length is {self.tokens}. Raise it"
            return BadSample(problem, "too_long")
        return made


def named(source: Any) -> Callable[[int], str]:
    """What gives the place of a record, for messages."""
    return getattr(source, "where", "record {}".format)


class Batches:
    """An endless iterator of `Batch`es over a source; every epoch holds each record once, in its own order.

    What batch n holds follows from the data, the settings and `seed`. Samples are made in threads of this
    process or in `num_workers` processes, whose number only decides how fast they come. They start with the
    first batch. `close` ends them and may be called more than once; a batch asked for afterwards continues in
    the order. `state()` is the exact position in it, and may be restored with another number of workers, and
    after `merged` on another number of hosts.

    A bad sample raises DataError. With `on_bad_sample="skip"` it is left out, and DataError is raised when
    there are too many, see `omitted`.

    Args:
      source: has a length and gives the record at an index.
      prepare: makes a Sample of a record, or a list of the Samples of its rows, which follow one another.
      batch_size: rows of a batch, on all hosts; or examples, if a record makes several rows.
      length, tiles, pools, usual: as in `batch.collate`; pools on all hosts.
      shares: what each set of data gives to an epoch; None: the source is one set, and gives all it has.
      choose: which dialogues go into a row together, a packing.Alone or packing.Fullest.
      on_long: what is done with a dialogue whose DataError has the reason "too_long": "raise"; "skip"; or the
        same as with other bad samples.
      numbers: of the rows that this host makes, if several share the batches; None: all.
      gather: called by all hosts at the same points with something small, for JSON; gives what each of them
        has given. An exception tells the others that this host has no further batch.
      check: a function that starts a data.check.Check of the same source, or returns None. It is called when
        the first sample is read, unless an earlier start of the run completed its check or an epoch.
        `checked` asks for its report before the first step and with every later batch, prints it, and raises
        DataError as above.
    """

    def __init__(
        self,
        source: Any,
        prepare: Callable[..., Sample | list[Sample]],
        *,
        batch_size: int,
        length: int,
        tiles: dict,
        pools: int | None = None,
        usual: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        shares: Sequence[Share] | None = None,
        choose: Alone | Fullest | None = None,
        num_workers: int = 0,
        on_bad_sample: str = "raise",
        on_long: str = "",
        bad_share: float = 0.01,
        numbers: Sequence[int] | None = None,
        gather: Callable = alone,
        check: Callable | None = None,
    ):
        pools = batch_size if pools is None else pools
        self.numbers = range(batch_size) if numbers is None else numbers
        mine, rest = divmod(pools * len(self.numbers), batch_size)
        assert mine and not rest, f"{len(self.numbers)} of {batch_size} rows, {pools} pools in all"
        self.batch_size, self.num_workers, self.on_bad_sample = batch_size, num_workers, on_bad_sample
        self.form = {"length": length, "pools": mine, "usual": usual, "gather": gather}
        self.tiles, self.choose = tiles, choose or Alone()
        self.records, self.content = len(source), getattr(source, "fingerprint", None)
        self.features = getattr(source, "made_by", None)  # what made features of the media, if anything
        self.order = Order(shares or [Share(self.records, self.records)], seed, shuffle)
        self.reader = Read.of(source, prepare, self.choose)
        self.name = named(source)
        self.omitted = Omitted(
            self.records,
            on_bad=on_bad_sample,
            on_long=on_long,
            bad_share=bad_share,
            drawn=shuffle,
            gather=gather,
        )
        self.start_check, self.check, self.waited, self.all_checked = check, None, False, False
        self.position = {"rows": {}} | self.omitted.state()  # after the last batch that was given
        self.plan = []  # of that batch: for each row the positions of its records in the order
        self.made = None  # an Ahead

    @property
    def skipped(self) -> int:
        """How many different records were left out."""
        return len(self.position["bad"])

    @property
    def seen(self) -> int:
        """How many records were looked at."""
        return sum(looked for looked, *_ in self.position["rows"].values())

    def counts(self) -> dict[str, int]:
        """What metrics tell: records left out so far, those of them that are too long, and dialogues cut."""
        too_long = len(self.position["too_long"])
        cut = sum(cut for _, cut, _ in self.position["rows"].values())
        return {"skipped": self.skipped, "too_long": too_long, "cut": cut}

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if self.made is not None:
            self.checked()
        else:
            self.begin_check()
            readers = Readers(self.reader, self.tiles, self.name, self.num_workers)
            made = batches(readers, self.planned(readers), self.omitted, self.form)
            self.made = Ahead(made, DEPTH, readers.close)
        try:
            batch, self.position, self.plan = next(self.made)
        except DataError as error:
            if self.on_bad_sample != "raise":
                raise
            others = self.check and self.check.wait(WAIT)  # so that one run names all bad records
            self.end_check()
            report = f"\n{others}" if others and others.bad else ""
            raise DataError(f"{error}{report}", error.reason) from error
        return batch

    def planned(self, readers):
        """The Rows of this host from the present position on."""
        rows = Rows(readers, self.order, self.batch_size, self.numbers, self.choose, self.omitted)
        self.omitted.restore(self.position)
        if self.position["rows"]:
            rows.restore(self.position["rows"])
        return rows

    def problem(self, index):
        """The problem of a record left out; if an earlier start of the run met it, it is read again."""
        known = self.omitted.found.get(index) or self.reader(index)
        if isinstance(known, BadSample):
            return known.problem
        return f"record {index} could not be used when an earlier start of the run read it; now it can"

    def places(self, plan: Sequence[Sequence[int]]) -> list[list[str]]:
        """The places of the records of a batch, row by row, from its `plan`."""
        return [[self.name(self.order[n]) for n in row] for row in plan]

    def left_out(self) -> list[str]:
        """Lines that name the first `SHOWN` records left out, and count the others."""
        lines = [f"left out: {self.problem(index)}" for index in self.position["bad"][:SHOWN]]
        if self.skipped > SHOWN:
            lines.append(f"left out: {self.skipped - SHOWN:,} more")
        return lines

    def checked(self):
        """Prints the check's report, after a wait the first time. Raises DataError if the run must stop."""
        if self.check is None:
            return
        report = self.check.wait(0 if self.waited else WAIT)
        if report.bad and self.on_bad_sample == "raise":
            self.end_check()
            raise DataError(f"{report}\n({SKIP}; data.check=off starts without looking)")
        share = self.omitted.bad_share
        if report.bad > allowed(share, self.records):
            self.end_check()
            most = f"of all {self.records:,} no more than {allowed(share, self.records):,} may be"
            raise DataError(f"{report}\nToo many: {most} (data.bad_share={share:g})")
        if report.done:
            print(f"{report}\nThey are left out and counted." if report.bad else report, flush=True)
            self.all_checked = report.failed is None
            self.end_check()
        elif not self.waited:
            print(f"{report} so far; the check goes on beside training", flush=True)
        self.waited = True

    def state(self) -> dict:
        """The position and what is known of the data, for JSON. It is cheap: every batch calls it."""
        data = {"records": self.records, "content": self.content, "checked": self.all_checked}
        return data | self.position

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken, with the same seed; forgets what was known of other data."""
        self.end_reading()
        same = (state["records"], state["content"]) == (self.records, self.content)
        unknown = {"bad": [], "too_long": [], "history": []}
        mine = {str(number): state["rows"][str(number)] for number in self.numbers if state["rows"]}
        self.position = state | {"rows": mine} | ({} if same else unknown)
        for name in ("records", "content", "checked"):
            del self.position[name]
        self.omitted.found = {}
        self.all_checked = same and state["checked"]
        if self.all_checked or (same and self.seen >= self.records):  # every record has been read once
            self.start_check = None
            self.end_check()

    def close(self) -> None:
        """Ends all threads and processes; a check that is still running prints how far it came."""
        self.end_reading()
        if self.check is not None:
            print(f"{self.check.report} when the run ended", flush=True)
        self.end_check()

    def end_reading(self):
        if self.made is not None:
            self.made.close()
            self.made = None

    def begin_check(self):
        if self.start_check is not None:
            self.check, self.start_check = self.start_check(), None

    def end_check(self):
        if self.check is not None:
            self.check.close()
            self.check = None


def batches(readers, rows, omitted, form):
    """Yields batches, each with the position after it and its plan."""
    try:
        for plan in rows:
            position = {"rows": rows.state()} | omitted.state()
            yield readers.collect(plan, **form), position, plan
    except Exception as error:
        form["gather"](error)  # or the other hosts would wait for this one
        raise


def merged(states: Sequence[dict]) -> dict:
    """The state of a run from those of all its hosts."""
    return states[0] | {"rows": functools.reduce(operator.or_, (state["rows"] for state in states))}


def counted(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    """The counts of a run from those of hosts with different rows; of records left out all know the same."""
    return counts[0] | {"cut": sum(one["cut"] for one in counts)}
