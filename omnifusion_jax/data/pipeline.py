"""From a source to batches: shuffle, lay out (in threads or worker processes), collect."""

import atexit
import dataclasses
import functools
import signal
import weakref
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from omnifusion_jax.batch import FEATURE, Sample, collate
from omnifusion_jax.data import synthetic
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.errors import DataError, OmniFusionError

TOLERATED = 0.01  # share of bad samples above which a run with on_bad_sample="skip" stops


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
        labels = np.array([synthetic.CELL_WORDS.index(word) for word in synthetic.patch_words(scene, self.side)], np.int32)
        n = len(labels)
        return Sample(
            labels, np.full(n, FEATURE, np.int32), np.arange(n, dtype=np.int32), np.ones(n, np.float32), (synthetic.render(scene, rng)[None],)
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


class Batches:
    """An iterator of `Batch`es over a source, without end: every epoch holds each sample once, in an order of its own.

    The order follows from `seed` alone. Threads of this process or `num_workers` processes only decide how fast samples come; `state()` is the exact
    position in the order, and may be restored with another number of workers. Processes start at the first batch and each imports the package and
    holds the source; a script that uses them needs `if __name__ == "__main__":`, as with all of Python's spawned processes.

    A bad sample raises DataError, or with `on_bad_sample="skip"` is left out and counted in `skipped` and `bad` (index -> problem); then DataError is
    raised when more than 1 % of the samples seen so far are bad, or of the first hundred more than one.
    """

    def __init__(self, source, prepare, *, batch_size, length, tiles=1, sizes, seed=0, shuffle=True, num_workers=0, on_bad_sample="raise"):
        self.batch_size, self.num_workers, self.on_bad_sample = batch_size, num_workers, on_bad_sample
        self.collate = functools.partial(collate, length=length, tiles=tiles, sizes=sizes)
        self.bad, self.skipped, self.seen = {}, 0, 0
        self.records = len(source)
        self.reader = Read(source, prepare)
        indices = grain.MapDataset.range(len(source)).seed(seed)
        self.indices = (indices.shuffle() if shuffle else indices).repeat()
        self.samples = self.read(0)
        if num_workers:
            atexit.register(close, weakref.ref(self))

    def read(self, start):
        """An iterator over the samples from the `start`-th on."""
        ahead = -(-2 * self.batch_size // max(1, self.num_workers))  # two batches over all workers, and as much again on its way from them
        samples = self.indices[start:].map(self.reader).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=ahead))
        if self.num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads a flag of its own, which has no value outside a command line
            options = grain.MultiprocessingOptions(num_workers=self.num_workers, per_worker_buffer_size=ahead)
            samples = samples.mp_prefetch(options, deaf)
        return iter(samples)

    def __iter__(self):
        return self

    def __next__(self):
        samples = []
        while len(samples) < self.batch_size:
            sample = next(self.samples)
            self.seen += 1
            if isinstance(sample, BadSample):
                self.skip(sample)
            else:
                samples.append(sample)
        return self.collate(samples)

    def skip(self, sample):
        if self.on_bad_sample == "raise":
            raise DataError(f"{sample.problem.rstrip('.')}. (data.on_bad_sample=skip leaves such samples out and counts them)")
        self.bad[sample.where] = sample.problem
        self.skipped += 1
        if self.skipped > max(1, TOLERATED * max(self.seen, 100)):
            shown = "\n  ".join(list(self.bad.values())[:10])
            raise DataError(f"{self.skipped} of {self.seen} samples are bad, more than {TOLERATED:.0%}:\n  {shown}")

    def state(self):
        """A JSON-serialisable position."""
        return {"records": self.records, "seen": self.seen, "skipped": self.skipped, "bad": list(self.bad.items())}

    def restore(self, state):
        """Goes on where `state` was taken, over the same source and with the same seed."""
        self.seen, self.skipped, self.bad = state["seen"], state["skipped"], {where: problem for where, problem in state["bad"]}
        self.samples.close()
        self.samples = self.read(self.seen)

    def close(self):
        """Ends the worker processes."""
        self.samples.close()


def deaf(*_):
    """In a worker process: Ctrl-C in a terminal reaches it too, but the step that a run ends with still needs it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def close(batches):
    """Ends the worker processes of a `Batches` that is still there at exit, before multiprocessing takes away what they need for it."""
    if (batches := batches()) is not None:
        batches.samples.close()
        batches.samples = None
