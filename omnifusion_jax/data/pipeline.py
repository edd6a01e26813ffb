"""From a source to batches: shuffle, lay out (in threads or worker processes), collect."""

import dataclasses
import functools
from typing import NamedTuple

import grain
import numpy as np

from omnifusion_jax.batch import FEATURE, Sample, collate
from omnifusion_jax.data import images, synthetic
from omnifusion_jax.errors import DataError, OmniFusionError

TOLERATED = 0.01  # share of bad samples above which a run with on_bad_sample="skip" stops


def keep(sample):
    """For sources that give samples already."""
    return sample


class BadSample(NamedTuple):
    where: int
    problem: str


@dataclasses.dataclass
class LayOut:
    """Dialogue to Sample: opens its pictures, makes them `size` pixels a side, lays the text out."""

    layout: object
    size: int
    max_pixels: int = 50_000_000

    def __call__(self, dialogue):
        pictures = [images.preprocess(images.open_image(source, max_pixels=self.max_pixels), self.size) for source in dialogue.images]
        return self.layout(dialogue, np.stack(pictures) if pictures else np.zeros((0, self.size, self.size, 3), np.uint8))


@dataclasses.dataclass
class PatchSource:
    """Samples for a bare encoder: token i says what stands in the place that patch i lies in, as an index into `synthetic.CELL_WORDS`."""

    side: int
    split: str = "train"

    def __len__(self):
        return 2**30

    def __getitem__(self, i):
        scene, rng = synthetic.scene_and_rng(i, self.split)
        labels = np.array([synthetic.CELL_WORDS.index(word) for word in synthetic.patch_words(scene, self.side)], np.int32)
        n = len(labels)
        return Sample(labels, np.full(n, FEATURE, np.int32), np.arange(n, dtype=np.int32), np.ones(n, np.float32), synthetic.render(scene, rng)[None])


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
    """An iterator of `Batch`es over a source, without end, in an order that follows from the seed; `state()` is its exact position.

    Bad samples raise DataError, or with `on_bad_sample="skip"` are counted in `bad` (index -> problem) and left out, at most 1 % of them.
    """

    def __init__(self, source, prepare, *, batch_size, length, size, seed=0, shuffle=True, num_workers=0, on_bad_sample="raise"):
        self.batch_size, self.on_bad_sample = batch_size, on_bad_sample
        self.collate = functools.partial(collate, length=length, images=1, size=size)
        self.bad, self.skipped, self.seen = {}, 0, 0
        indices = grain.MapDataset.range(len(source)).seed(seed)
        indices = indices.shuffle() if shuffle else indices
        samples = indices.repeat().map(Read(source, prepare)).to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=2 * batch_size))
        if num_workers:
            samples = samples.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=batch_size))
        self.samples = iter(samples)

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
            raise DataError(f"{sample.problem}. (data.on_bad_sample=skip leaves such samples out and counts them)")
        self.bad[sample.where] = sample.problem
        self.skipped += 1
        if self.skipped > max(1, TOLERATED * max(self.seen, 100)):
            shown = "\n  ".join(list(self.bad.values())[:10])
            raise DataError(f"{self.skipped} of {self.seen} samples are bad, more than {TOLERATED:.0%}:\n  {shown}")

    def state(self):
        """A JSON-serialisable position."""
        return {"samples": self.samples.get_state(), "skipped": self.skipped, "seen": self.seen, "bad": list(self.bad.items())}

    def restore(self, state):
        self.samples.set_state(state["samples"])
        self.skipped, self.seen, self.bad = state["skipped"], state["seen"], {where: problem for where, problem in state["bad"]}
