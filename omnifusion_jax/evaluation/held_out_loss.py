"""The loss of held-out dialogues: that of training, over all their targets, without dropout."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping

import jax

from omnifusion_jax.batch import Batch, collate
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.sources import Source
from omnifusion_jax.inference.prompts import BLANK
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.sharding import mesh_of, ways
from omnifusion_jax.training.step import batch_sharding


class HeldOutLoss:
    """Gives the mean loss of dialogues, by target tokens, under the parameters that it is called with.

    If these are spread over a mesh, the rows of a batch are too.

    Args:
      loss: of an objective, as `objectives.base.Objective` describes it.
      module: the objective's module, with shapes for parameters.
      prepare: makes the Sample of a dialogue.
      count: the first so many dialogues count; 0: all of a finite source.
      length: tokens of a row.
      rows: of a batch, one dialogue each; rounded up to what devices can share evenly.
      dtype: of the computation.
    """

    def __init__(
        self,
        loss: Callable,
        module: nnx.Module,
        source: Source,
        prepare: Prepare,
        *,
        count: int,
        length: int,
        rows: int,
        dtype: str,
    ):
        self.source, self.prepare, self.length, self.rows = source, prepare, length, rows
        self.numbers = range(min(count or len(source), len(source)))
        self.usual = max(processor.room for processor in prepare.processors.values())

        @jax.jit
        def sums(arrays, batch):
            return loss(nnx.with_parameters(module, cast(arrays, dtype)), batch, None, "none")

        self.sums = sums  # one program, however often it is called

    def __call__(self, arrays: Mapping[str, jax.Array]) -> float:
        mesh = mesh_of(arrays.values())
        spread = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
        total = targets = 0.0
        running = None  # read while the next batch is made, so that neither waits for the other
        with spread:
            for batch in self.batches(1 if mesh is None else ways(mesh, "batch")):
                before, running = running, self.sums(arrays, put(batch, mesh))
                if before is not None:
                    total, targets = total + before[0].item(), targets + before[1].item()
        return (total + running[0].item()) / max(targets + running[1].item(), 1.0)

    def batches(self, shares: int) -> Iterator[Batch]:
        """Batches whose rows `shares` devices can share; blank rows fill the last one up."""
        rows = -(-min(self.rows, len(self.numbers)) // shares) * shares
        samples = (self.prepare(self.source[i]) for i in self.numbers)
        while some := list(itertools.islice(samples, rows)):
            some += [BLANK] * (rows - len(some))
            yield collate(some, self.length, self.prepare.tiles, shares, self.usual)


def put(batch, mesh):
    return batch if mesh is None else jax.device_put(batch, batch_sharding(mesh))
