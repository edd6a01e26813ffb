"""From a source to batches: shuffles, lays out (in threads or worker processes) and collects."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from omnifusion_jax.batch import FEATURE, Batch, Sample, collate
from omnifusion_jax.data import synthetic
from omnifusion_jax.data.ahead import Ahead
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.errors import DataError, OmniFusionError

WAIT = 20  # seconds that the first step waits at most for the check of the data
SHOWN = 10  # bad records that a message names
SKIP = "data.on_bad_sample=skip leaves such samples out and counts them"


def keep(sample: Sample) -> Sample:
    """The `prepare` of sources that already give samples."""
    return sample


class BadSample(NamedTuple):
    """Stands for a record that cannot be used."""

    where: int  # its index in the source
    problem: str


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
    """Gives sample `i` of a source, or a BadSample in place of an OmniFusionError.

    Exceptions do not pass well between processes, and whether to skip is decided in one place.
    """

    source: Any
    prepare: Callable[..., Sample | list[Sample]]

    def __call__(self, i):
        try:
            return self.prepare(self.source[int(i)])
        except OmniFusionError as error:
            return BadSample(int(i), str(error))


def allowed(bad_share: float, records: int) -> int:
    """How many of the `records` of a source may be bad."""
    return max(1, math.floor(bad_share * records))


def hopeless(bad: int, read: int, bad_share: float) -> bool:
    """Whether so many bad records leave no doubt that more than `bad_share` of a source are bad.

    This is so when `bad` of `read` records, drawn at random, exceed the expected number by 4 standard
    deviations, and by 3 more records for small numbers. Fewer than one run in 10,000 is stopped wrongly.
    """
    expected = bad_share * read
    return bad > expected + 4 * math.sqrt(expected) + 3


class Batches:
    """An endless iterator of `Batch`es over a source; every epoch holds each record once, in its own order.

    The order follows from `seed` and the number of records alone. Samples are made in threads of this process
    or in `num_workers` processes, whose number only decides how fast samples come. They start with the first
    batch. `close` ends them and may be called more than once; a batch asked for afterwards continues in the
    order. `state()` is the exact position in it, and may be restored with another number of workers.

    A bad sample raises DataError. With `on_bad_sample="skip"` it is left out and its index is put in `bad`
    with the problem, which is None if an earlier start of the run met it. DataError is then raised when all
    records, or more than `bad_share` of them and more than one, turn out to be bad in one epoch, or as soon
    as the records read so far leave no doubt of it.

    Args:
      source: has a length and gives the record at an index.
      prepare: makes a Sample of a record, or a list of the Samples of its rows, which follow one another.
      batch_size: records of a batch.
      length, tiles, pools, usual: as in `batch.collate`.
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
        num_workers: int = 0,
        on_bad_sample: str = "raise",
        bad_share: float = 0.01,
        check: Callable | None = None,
    ):
        import grain  # here because it imports JAX, which worker processes do without

        self.batch_size, self.num_workers, self.shuffle = batch_size, num_workers, shuffle
        self.on_bad_sample, self.bad_share = on_bad_sample, bad_share
        self.start_check, self.check, self.waited, self.all_checked = check, None, False, False
        self.collate = functools.partial(collate, length=length, tiles=tiles, pools=pools, usual=usual)
        self.records, self.content = len(source), getattr(source, "fingerprint", None)
        self.seen, self.bad, self.bad_now = 0, {}, 0
        self.reader, self.samples = Read(source, prepare), None
        indices = grain.MapDataset.range(self.records).seed(seed)
        self.order = (indices.shuffle() if shuffle else indices).repeat()

    @property
    def skipped(self) -> int:
        """How many different records were left out."""
        return len(self.bad)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        if self.samples is not None:
            self.checked()
        if self.samples is None:
            self.begin_check()
            self.samples = Ahead(
                self.reader, self.order, self.seen, processes=self.num_workers, ahead=2 * self.batch_size
            )
        records = []  # the rows of each
        while len(records) < self.batch_size:
            sample = next(self.samples)
            if self.seen % self.records == 0:
                self.bad_now = 0  # an epoch begins
            self.seen += 1
            if isinstance(sample, BadSample):
                self.skip(sample)
            else:
                records.append([sample] if isinstance(sample, Sample) else sample)
        assert len(set(map(len, records))) == 1, "records give different numbers of rows"
        return self.collate(list(itertools.chain.from_iterable(records)))

    def skip(self, sample):
        """Leaves a BadSample out. Raises DataError if none may be, or if there are too many."""
        if self.on_bad_sample == "raise":
            others = self.check and self.check.wait(WAIT)  # so that one run names all bad records
            self.end_check()
            report = f"\n{others}" if others and others.bad else ""
            raise DataError(f"{sample.problem.rstrip('.')}. ({SKIP}){report}")
        self.bad[sample.where] = sample.problem
        self.bad_now += 1
        read = (self.seen - 1) % self.records + 1
        too_many = self.bad_now > allowed(self.bad_share, self.records) or self.bad_now == self.records
        if too_many or (self.shuffle and hopeless(self.bad_now, read, self.bad_share)):
            shown = "\n  ".join(map(self.problem, list(self.bad)[-SHOWN:]))
            raise DataError(
                f"{self.bad_now:,} of the {read:,} records read in this epoch are bad; "
                f"{self.limit()}:\n  {shown}"
            )

    def problem(self, index):
        """The problem of a record left out; if an earlier start of the run met it, it is read again."""
        if self.bad[index] is None:
            again = self.reader(index)
            fine = f"record {index} could not be used when an earlier start of the run read it; now it can"
            self.bad[index] = again.problem if isinstance(again, BadSample) else fine
        return self.bad[index]

    def left_out(self) -> list[str]:
        """Lines that name the first `SHOWN` records left out, and count the others."""
        lines = [f"left out: {self.problem(index)}" for index in list(self.bad)[:SHOWN]]
        if self.skipped > SHOWN:
            lines.append(f"left out: {self.skipped - SHOWN:,} more")
        return lines

    def limit(self):
        """How many bad records are allowed, for messages."""
        most = allowed(self.bad_share, self.records)
        return f"of all {self.records:,} no more than {most:,} may be (data.bad_share={self.bad_share:g})"

    def checked(self):
        """Prints the check's report, after a wait the first time. Raises DataError if the run must stop."""
        if self.check is None:
            return
        report = self.check.wait(0 if self.waited else WAIT)
        if report.bad and self.on_bad_sample == "raise":
            self.end_check()
            raise DataError(f"{report}\n({SKIP}; data.check=off starts without looking)")
        if report.bad > allowed(self.bad_share, self.records):
            self.end_check()
            raise DataError(f"{report}\nToo many: {self.limit()}")
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
        return data | {"seen": self.seen, "bad_now": self.bad_now, "bad": list(self.bad)}

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken, with the same seed; forgets what was known of other data."""
        self.end_reading()
        same = (state["records"], state["content"]) == (self.records, self.content)
        self.seen = state["seen"]
        self.bad_now = state["bad_now"] if same else 0
        self.bad = dict.fromkeys(state["bad"]) if same else {}
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
        if self.samples is not None:
            self.samples.close()
            self.samples = None

    def begin_check(self):
        if self.start_check is not None:
            self.check, self.start_check = self.start_check(), None

    def end_check(self):
        if self.check is not None:
            self.check.close()
            self.check = None
