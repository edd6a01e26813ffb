"""From a source to batches: shuffle, lay out (in threads or worker processes), collect."""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np

from omnifusion_jax.batch import FEATURE, Sample, collate
from omnifusion_jax.data import synthetic
from omnifusion_jax.data.ahead import Ahead
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.errors import DataError, OmniFusionError

WAIT = 20  # seconds at most that the first step waits for the check of the data
SHOWN = 10  # bad records that a message names
SKIP = "data.on_bad_sample=skip leaves such samples out and counts them"


def keep(sample):
    """For sources that give samples already."""
    return sample


class BadSample(NamedTuple):
    where: int
    problem: str


@dataclasses.dataclass
class PatchSource:
    """Samples for a bare encoder: token i says what stands in the place that patch i lies in, as an index into `synthetic.CELL_WORDS`."""

    side: int
    split: str = "train"

    def __len__(self):
        return ENDLESS

    def __getitem__(self, i):
        scene, rng = synthetic.scene_and_rng(i, self.split)
        labels = np.array(
            [synthetic.CELL_WORDS.index(word) for word in synthetic.patch_words(scene, self.side)], np.int32
        )
        n = len(labels)
        kind, index = np.full(n, FEATURE, np.int32), np.arange(n, dtype=np.int32)
        return Sample(
            labels,
            kind,
            index,
            np.ones(n, np.float32),
            {"image": (synthetic.render(scene, rng)[None],)},
            1,
            n,
        )


@dataclasses.dataclass
class Read:
    """Sample `i` of a source, or what is wrong with it: exceptions do not cross processes well, and whether to skip is decided in one place."""

    source: object
    prepare: object

    def __call__(self, i):
        try:
            return self.prepare(self.source[int(i)])
        except OmniFusionError as error:
            return BadSample(int(i), str(error))


def allowed(bad_share, records):
    """How many of the `records` of a source may be bad."""
    return max(1, math.floor(bad_share * records))


def hopeless(bad, read, bad_share):
    """Whether `bad` of `read` records drawn at random are more than chance explains where `bad_share` of all are bad.

    By 4 standard deviations, and 3 records for small numbers: less than one run in 10,000 would be stopped wrongly.
    """
    expected = bad_share * read
    return bad > expected + 4 * math.sqrt(expected) + 3


class Batches:
    """An iterator of `Batch`es over a source, without end: every epoch holds each record once, in an order of its own.

    The order follows from `seed` and the number of records alone. Threads of this process or `num_workers` processes only
    decide how fast samples come; `state()` is the exact position in the order, and may be restored with another number of
    workers. They start at the first batch. `close` ends them, and may be called again; a batch asked for after it goes on.

    A bad sample raises DataError, or with `on_bad_sample="skip"` is left out and stands in `bad` (index -> problem, None
    where an earlier start met it). Then DataError is raised when more than `bad_share` of the records, and more than one,
    turn out to be bad in one epoch; before its end already when those read so far leave no doubt.

    `check`: a function that starts a data.check.Check of the same source, or gives None. It is called when the first sample
    is read, unless an earlier start came through its check or through an epoch. `checked` asks the Check, before the first
    step and for every batch after the first. Its report is printed; what it finds raises DataError as above.
    """

    def __init__(
        self,
        source,
        prepare,
        *,
        batch_size,
        length,
        tiles,
        pools=None,
        usual=1,
        seed=0,
        shuffle=True,
        num_workers=0,
        on_bad_sample="raise",
        bad_share=0.01,
        check=None,
    ):
        import grain  # brings JAX along, which worker processes do without

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
    def skipped(self):
        """How many different records were left out."""
        return len(self.bad)

    def __iter__(self):
        return self

    def __next__(self):
        if self.samples is not None:
            self.checked()
        if self.samples is None:
            self.begin_check()
            self.samples = Ahead(
                self.reader, self.order, self.seen, processes=self.num_workers, ahead=2 * self.batch_size
            )
        samples = []
        while len(samples) < self.batch_size:
            sample = next(self.samples)
            if self.seen % self.records == 0:
                self.bad_now = 0  # an epoch begins
            self.seen += 1
            if isinstance(sample, BadSample):
                self.skip(sample)
            else:
                samples.append(sample)
        return self.collate(samples)

    def skip(self, sample):
        if self.on_bad_sample == "raise":
            others = self.check and self.check.wait(WAIT)  # hear of all at once, rather than of one a run
            self.end_check()
            raise DataError(
                f"{sample.problem.rstrip('.')}. ({SKIP})" + (f"\n{others}" if others and others.bad else "")
            )
        self.bad[sample.where] = sample.problem
        self.bad_now += 1
        read = (self.seen - 1) % self.records + 1
        too_many = self.bad_now > allowed(self.bad_share, self.records) or self.bad_now == self.records
        if too_many or (self.shuffle and hopeless(self.bad_now, read, self.bad_share)):
            shown = "\n  ".join(map(self.problem, list(self.bad)[-SHOWN:]))
            raise DataError(
                f"{self.bad_now:,} of the {read:,} records read in this epoch are bad; {self.limit()}:\n  {shown}"
            )

    def problem(self, index):
        """What is wrong with a record that was left out; it is read again where an earlier start of the run met it."""
        if self.bad[index] is None:
            again = self.reader(index)
            fine = f"record {index} could not be used when an earlier start of the run read it; now it can"
            self.bad[index] = again.problem if isinstance(again, BadSample) else fine
        return self.bad[index]

    def left_out(self):
        """Lines that name the records left out, the first `SHOWN` of them."""
        lines = [f"left out: {self.problem(index)}" for index in list(self.bad)[:SHOWN]]
        return lines + [f"left out: {self.skipped - SHOWN:,} more"] * (self.skipped > SHOWN)

    def limit(self):
        return f"of all {self.records:,} no more than {allowed(self.bad_share, self.records):,} may be (data.bad_share={self.bad_share:g})"

    def checked(self):
        """Prints what the check has found; raises DataError if that stops the run. Waits for it the first time."""
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

    def state(self):
        """A JSON-serialisable position, and what was learned of the data: cheap, for it is asked for after every batch."""
        data = {"records": self.records, "content": self.content, "checked": self.all_checked}
        return data | {"seen": self.seen, "bad_now": self.bad_now, "bad": list(self.bad)}

    def restore(self, state):
        """Goes on where `state` was taken, with the same seed. What was learned of another source is forgotten."""
        self.end_reading()
        same = (state["records"], state["content"]) == (self.records, self.content)
        self.seen, self.bad_now, self.bad = (
            state["seen"],
            state["bad_now"] * same,
            dict.fromkeys(state["bad"]) if same else {},
        )
        self.all_checked = same and state["checked"]
        if self.all_checked or (same and self.seen >= self.records):  # all have been looked at
            self.start_check = None
            self.end_check()

    def close(self):
        """Ends threads and processes, those of the check too, which then says how far it came."""
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
