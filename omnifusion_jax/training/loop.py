"""The training loop."""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from omnifusion_jax import hosts, sharding
from omnifusion_jax.batch import Batch
from omnifusion_jax.config import TrainConfig, check, to_json
from omnifusion_jax.data.pipeline import counted, merged
from omnifusion_jax.errors import HostError
from omnifusion_jax.training import meters
from omnifusion_jax.training.bad_steps import BadSteps
from omnifusion_jax.training.checkpoint import Checkpoints
from omnifusion_jax.training.compiled import Compiled
from omnifusion_jax.training.evaluating import Evaluations
from omnifusion_jax.training.monitor import Monitor
from omnifusion_jax.training.profile import Span, Trace
from omnifusion_jax.training.program import Program, make_program
from omnifusion_jax.training.resume import same_data, same_versions, versions, write_config
from omnifusion_jax.training.signals import Stop, Stopped
from omnifusion_jax.training.start import begin, starting, streams
from omnifusion_jax.training.step import TrainState, batch_sharding
from omnifusion_jax.training.weights_and_biases import WeightsAndBiases


def train(
    config: TrainConfig,
    workdir,
    batches,
    given: dict,
    evaluations=None,
    allow_change=False,
    stop=None,
    profile: Span | None = None,
):
    """Runs `config.steps` steps, resuming from `workdir` when it holds a checkpoint.

    With several hosts all of them call it, each with batches of its own rows (sharding.shares).

    Args:
      batches: an iterator with `state()`, `restore(state)`, `counts()`, `checked()`, `plan` and
        `places(plan)`, like data.pipeline.Batches.
      given: {path: array} of the parameters to start from, taken out of the dict; the others are drawn.
      evaluations: an evaluating.Evaluations; None: there are none.
      allow_change: go on although the data set is not the one that the run was saved with.
      stop: a signals.Stop that may end the run after a step, whose state is then saved; None: nothing does.
      profile: steps that are traced into WORKDIR/profile.
    Returns: (trained, frozen), two dicts {path: array}; trained arrays are float32.
    Raises:
      NotFinite: `max_bad_steps` steps were skipped.
      CheckpointError: no checkpoint fits or can be read, or none can be written.
      ConfigError: the data set is another one, the mesh does not fit the batch or the devices, or a table
        (`train_parts`, AXES, DECAY) does not cover every parameter exactly once.
      Stopped: `stop` ended the run.
    """
    stop, evaluations = stop or Stop(hosts.count()), evaluations or Evaluations(None, config)
    mesh = sharding.make_mesh(**vars(config.mesh))
    tell, features = functools.partial(print, flush=True), streams(batches)
    program = make_program(config, mesh, tell, features)
    trained, frozen = starting(config, mesh, given, features)
    hosts.barrier()  # the first collective follows, and hosts may have taken more or less long to load
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, evaluations.best)
    state, interval = resumed(config, program, checkpoints, batches, allow_change)
    if state is None:
        state = begin(program, trained)
        hosts.by_first(lambda: write_config(config, workdir))
    del trained
    done = stop.step = int(state.step)
    monitor = Monitor(
        workdir,
        config.steps,
        done,
        config.log_every,
        interval,
        meters.peak(config, mesh, tell),
        functools.partial(meters.memory, mesh.local_devices),
        [WeightsAndBiases(config, workdir)] if config.wandb and hosts.first() else [],
    )
    trace = Trace(workdir, profile, done, monitor.pause)
    evaluations.resume(workdir)
    run = Run(config, workdir, program, frozen, batches, checkpoints, monitor, evaluations, stop, trace)
    with stop.deferred():
        try:
            params = run.steps(state).params
            del state  # its moments leave room for the last evaluation
            with stop.deferred(False):
                evaluations(config.steps, {**params, **frozen}, monitor)
        finally:
            monitor.close()
            checkpoints.close()
    return params, frozen


def resumed(config, program, checkpoints, batches, allow_change):
    """(state, open interval of the monitor) of the newest checkpoint, whose place the batches take up.

    (None, None) when there is none. Raises: as `train` does.
    """
    found = checkpoints.restore(program.state, jax.tree.map(lambda a: a.sharding, program.state))
    if found is None:
        return None, None
    state, position = found
    same_data(position["data"], batches.state(), allow_change)
    same_versions(position["versions"])
    batches.restore(position["data"])
    done = int(state.step)
    nothing = f"all {done} steps are done: nothing is left to train"
    print(f"resuming from step {done}" if done < config.steps else nothing, flush=True)
    return state, position["interval"]


@dataclasses.dataclass
class Run:
    """The steps of a run, and what each of them needs."""

    config: TrainConfig
    workdir: Path
    program: Program
    frozen: dict[str, jax.Array]
    batches: Iterator[Batch]  # see `train`
    checkpoints: Checkpoints
    monitor: Monitor
    evaluations: Evaluations
    stop: Stop
    trace: Trace

    def steps(self, state: TrainState) -> TrainState:
        """Runs the steps that are left, and returns the last state.

        The metrics of step n are read only while step n + 1 runs, so that the device does not wait for that.
        When the run is asked to stop, the state of its last step is saved, and Stopped is raised again.
        """
        config, batches, monitor, stop = self.config, self.batches, self.monitor, self.stop
        begun, unread, paths = int(state.step), None, sorted(state.params)
        placed = batch_sharding(sharding.mesh_of(state.params.values()))
        owners = sharding.owners(sharding.shares(placed.mesh, config.batch_size))
        bad_steps = BadSteps(self.workdir, config.max_bad_steps, begun, int(state.bad_steps))
        compiled = Compiled(self.program, placed.mesh, monitor.pause, stop)
        read = functools.partial(report, monitor, bad_steps, batches, paths, owners)
        about = {"config": json.loads(to_json(config)), "versions": versions()}

        def evaluate(n):
            with monitor.pause(), stop.deferred(False):
                self.evaluations(n, {**state.params, **self.frozen}, monitor)

        def settle(n, saves):
            """Finishes step n: reads its metrics, and saves its state if `saves`."""
            jax.block_until_ready(state)  # this wait counts as time of the step
            read(unread)
            with monitor.pause():
                if saves:
                    monitor.keep()
                    whole = merged(hosts.gather(position))
                    self.checkpoints.save(n, state, {"data": whole, "interval": monitor.interval(), **about})
                    # Not before: until now the file was the config that the checkpoints were made with.
                    hosts.by_first(lambda: write_config(config, self.workdir))
                    stop.step = n

        def save():
            if done > begun:
                settle(done, saves=True)

        done, position = begun, batches.state()
        try:
            if self.evaluations.due(begun) and not hosts.by_first(lambda: monitor.evaluated(begun)):
                evaluate(begun)  # the evaluation after the resumed step was cut off
            for n in range(begun + 1, config.steps + 1):
                stop.check()
                before = time.perf_counter()
                batch, due, counts = following(batches, stop, save, self.checkpoints.due(n), owners)
                monitor.wait += time.perf_counter() - before
                rows_as_promised(config, batch)
                batch = jax.make_array_from_process_local_data(placed, batch)
                step = compiled(n, state, self.frozen, batch)
                if n == begun + 1:
                    with monitor.pause():
                        batches.checked()  # bad data is reported before the first step
                        stop.check()
                self.trace.before(n, state)
                with jax.set_mesh(placed.mesh), jax.transfer_guard("disallow"), self.trace.during(n):
                    state, metrics = step(state, self.frozen, batch)
                done, position = n, batches.state()
                self.trace.after(n, state)
                read(unread)
                unread = n, metrics, counts, batches.plan
                saves = due or n == config.steps or self.evaluations.decides(n)
                if saves or self.evaluations.due(n):
                    settle(n, saves)
                    unread = None
                if self.evaluations.due(n):
                    evaluate(n)
        except Stopped:
            save()
            raise
        finally:
            self.trace.close(done)  # of a run that ends within the span
        return state


def rows_as_promised(config, batch):
    """Checks what the kernel of attention was told: without packing, a row is one dialogue, then padding.

    Raises: ConfigError when it is not so.
    """
    alone = lambda: batch.segments.max() <= 1 and (np.diff(batch.segments, axis=1) <= 0).all()
    check(
        config.data.packing or alone(),
        "a row of the batch is not one dialogue and then padding, as data.packing=False promises the "
        "attention kernel. Set data.packing=True for rows that hold anything else",
    )


def following(batches, stop, save, due, owners):
    """The next batch, when all hosts have theirs; if one has none, calls `save` and raises its error again.

    The hosts agree here on all that they must do alike: what one of them alone did would leave the others
    waiting in a collective. `owners` are those whose counts make up that of all (sharding.owners).

    Returns: (this host's rows, whether to save after the step as the first host's clock says, counts of
    data).
    Raises: Stopped when the run was asked to stop; HostError for the error of another host.
    """
    batch = failed = None
    try:
        batch = next(batches)
    except Exception as error:
        failed = error
    word = {"asked": stop.asked, "error": failed and str(failed), "due": due, "counts": batches.counts()}
    words = hosts.gather(word)
    # The signal that asks the run to stop may have ended worker processes too; that is no error.
    stop.agree([word["asked"] for word in words])
    errors = [
        f"{hosts.name(i)}: {word['error']}" for i, word in enumerate(words) if word["error"] is not None
    ]
    if errors:
        save()
        if stop.step:
            print(
                f"no next batch: the state after step {stop.step} is saved, "
                "and the same command goes on from there",
                flush=True,
            )
        raise failed or HostError("\n".join(errors))
    return batch, words[0]["due"], counted([words[i]["counts"] for i in owners])


def report(monitor, bad_steps, batches, paths, owners, step):
    """Gives the metrics of a step to the monitor and to `bad_steps`, which may raise NotFinite.

    Args:
      paths: of the trained parameters, sorted.
      owners: the hosts whose rows make up the batch.
      step: (number, {name: array}, counts of the data, plan of its batch), or None for nothing to read.
    """
    if step is None:
        return
    n, arrays, counts, plan = step
    metrics = jax.device_get(arrays)
    broken = list(itertools.compress(paths, metrics.pop("broken")))
    metrics = {name: value.item() for name, value in metrics.items()}
    monitor.step(n, metrics, counts)

    def places():
        of_hosts = hosts.gather(batches.places(plan))
        return [row for i in owners for row in of_hosts[i]]

    bad_steps.take(n, metrics["bad"], broken, places)
