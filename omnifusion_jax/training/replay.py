"""Runs one step of a run again, to see which of its examples made a loss or a gradient NaN or infinite."""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from omnifusion_jax import sharding
from omnifusion_jax.batch import COLUMNS, Batch
from omnifusion_jax.config import TrainConfig, check, part_of
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.checkpoint import Checkpoints
from omnifusion_jax.training.program import make_program
from omnifusion_jax.training.resume import same_data
from omnifusion_jax.training.start import begin, starting, streams
from omnifusion_jax.training.step import batch_sharding


class Example(NamedTuple):
    """One example of a step, computed alone."""

    places: list[str]  # of its records
    loss: float  # the mean over its targets
    targets: float
    broken: list[str]  # the trained parameters whose gradient is NaN or infinite


class Replay(NamedTuple):
    """What a step did when it was run again, and what each of its examples does alone."""

    step: int
    loss: float
    grad_norm: float
    parts: dict[str, int]  # {part: its number of trained parameters}
    examples: list[Example]

    def lines(self) -> Iterator[str]:
        """The same for people."""
        skipped = not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))
        yield (
            f"step {self.step} again: loss {self.loss:.6g}, gradient norm {self.grad_norm:.6g}"
            f"{', so that it is skipped' if skipped else ''}. Its examples alone:"
        )
        for number, example in enumerate(self.examples):
            mark = "  <- NaN or infinite gradients" if example.broken else ""
            where = ", ".join(example.places)
            yield f"{number:6}  loss {example.loss:<10.6g} {example.targets:5.0f} targets  {where}{mark}"
        broken = sorted({path for example in self.examples for path in example.broken})
        for part, count in self.parts.items():
            paths = [path for path in broken if part_of(path) == part]
            if paths:
                yield f"{part}: {len(paths)} of {count} gradients are NaN or infinite: {', '.join(paths)}"
        if skipped and not broken:
            yield "No example does it alone: it comes of other draws of dropout, or of the sum of the batch"


def replay(
    config: TrainConfig, workdir: Path, number: int, batches, given: dict, allow_change: bool = False
) -> Replay:
    """Runs step `number` of the run in `workdir` again, from the newest checkpoint before it.

    The steps between them come again too, with the same batches. Nothing in `workdir` is changed. Arguments
    and errors as in `loop.train`; ConfigError also when the run has no such step.
    """
    check(0 < number <= config.steps, f"there is no step {number} to replay: the run has 1 to {config.steps}")
    mesh = sharding.make_mesh(**vars(config.mesh))
    features = streams(batches)
    program = make_program(config, mesh, features=features)
    trained, frozen = starting(config, mesh, given, features)
    placed = jax.tree.map(lambda a: a.sharding, program.state)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True)
    found = checkpoints.restore(program.state, placed, before=number)
    checkpoints.close()
    if found is None:
        state = begin(program, trained)
    else:
        state, position = found
        same_data(position["data"], batches.state(), allow_change)
        batches.restore(position["data"])
    del trained
    source = f"the checkpoint of step {state.step}" if found else "the start: no checkpoint is older"
    print(f"step {number} of {workdir}, from {source}", flush=True)
    spread = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        for _ in range(int(state.step) + 1, number):
            state, _ = program.step(state, frozen, jax.device_put(next(batches), spread))
        batch = next(batches)
        places = batches.places(batches.plan)
        examples = list(examined(config, mesh, state, frozen, batch, places, features))
        parts = collections.Counter(map(part_of, state.params))
        _, metrics = program.step(state, frozen, jax.device_put(batch, spread))
    return Replay(number, metrics["loss"].item(), metrics["grad_norm"].item(), dict(parts), examples)


def examined(config, mesh, state, frozen, batch, places, features) -> Iterator[Example]:
    """Yields what each example of a batch does alone, in the program of the run itself.

    Every device is given the same example.
    """
    copies, rows = sharding.ways(mesh, "batch"), OBJECTIVES[config.objective].rows
    step = make_program(
        dataclasses.replace(config, batch_size=copies, grad_accum=1, loss_mean_rows=0),
        mesh,
        features=features,
    ).step
    # The new state is not asked for, so that none is computed.
    measure = jax.jit(lambda state, frozen, batch: step(state, frozen, batch)[1])
    spread, paths = batch_sharding(mesh), sorted(state.params)
    for i, where in enumerate(places):
        one = jax.tree.map(lambda a: np.concatenate([a] * copies), alone(batch, i, rows))
        found = jax.device_get(measure(state, frozen, jax.device_put(one, spread)))
        broken = list(itertools.compress(paths, found["broken"]))
        yield Example(where, found["loss"].item(), found["targets"].item() / copies, broken)


def alone(batch: Batch, i: int, rows: int) -> Batch:
    """The `i`-th example of a batch, of `rows` rows, with the pool of media that they show."""
    first = i * rows
    media = {}
    for stream, views in batch.media.items():
        pools = [first * len(view) // len(batch.tokens) for view in views]
        media[stream] = tuple(view[pool : pool + 1] for view, pool in zip(views, pools, strict=True))
    rows_of = lambda a: a[first : first + rows]
    extra = {name: rows_of(column) for name, column in batch.extra.items()}
    return Batch(*map(rows_of, batch[: COLUMNS + 1]), media, extra)
