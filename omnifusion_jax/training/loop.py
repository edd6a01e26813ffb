"""The training loop."""

import functools
import time

import jax
import jax.numpy as jnp

from omnifusion_jax import sharding
from omnifusion_jax.config import TrainConfig, part_of
from omnifusion_jax.errors import CheckpointError, OmniFusionError
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import freeze
from omnifusion_jax.training.checkpoint import Checkpoints
from omnifusion_jax.training.monitor import Monitor
from omnifusion_jax.training.program import make_program
from omnifusion_jax.training.resume import same_data, write_config
from omnifusion_jax.training.signals import Stop, Stopped
from omnifusion_jax.training.step import batch_sharding, init_state


class NotFinite(OmniFusionError):
    """Too many steps had a NaN or infinite loss."""


def fill(config: TrainConfig, mesh, given: dict):
    """Makes every parameter of a run, sharded over `mesh`.

    The parameters in `given`, {path: array}, are taken out of it and used as they are; the others are drawn
    from the seed.

    Returns: (the objective's module with shapes for parameters, {path: parameter}).
    Raises: CheckpointError when a given parameter has another shape than the module's.
    """
    module = OBJECTIVES[config.objective].module
    skeleton = nnx.eval_shape(lambda: module(config.model, rngs=nnx.Rngs(0)))
    shapes = nnx.parameters(skeleton)
    placed = placements(mesh, shapes)
    wrong = [
        f"{path}: {given[path].shape}, needed {a.shape}"
        for path, a in shapes.items()
        if path in given and given[path].shape != a.shape
    ]
    if wrong:
        raise CheckpointError(
            "the parameters to start from do not fit config.model:\n  " + "\n  ".join(wrong)
        )
    missing = {path: placed[path] for path in shapes if path not in given}

    def fresh():
        arrays = nnx.parameters(module(config.model, rngs=nnx.Rngs(config.seed)))
        return {path: arrays[path] for path in missing}

    arrays = jax.jit(fresh, out_shardings=missing)()
    for path in shapes:
        if path in given:  # taken out, so that a large model is not held twice
            arrays[path] = jax.device_put(given.pop(path), placed[path])
    return skeleton, {path: arrays[path] for path in shapes}


def summary(trained: dict, frozen: dict) -> list[str]:
    """Lines that say which parts are trained and which are frozen, with their numbers of parameters."""
    lines = []
    for name, arrays in (("trained", trained), ("frozen", frozen)):
        for part in sorted(set(map(part_of, arrays))):
            count = sum(a.size for path, a in arrays.items() if part_of(path) == part)
            lines.append(f"{name:8} {part:16} {count:>15,}")
    return lines


def train(config: TrainConfig, workdir, batches, given: dict, on_eval=None, allow_change=False, stop=None):
    """Runs `config.steps` steps, resuming from `workdir` when it holds a checkpoint.

    Args:
      batches: an iterator with `state()`, `restore(state)`, `counts()` and `checked()`, like
        data.pipeline.Batches.
      given: {path: array} of the parameters to start from, taken out of the dict; the others are drawn.
      on_eval: called as on_eval(arrays) every `eval.every_steps` steps; it returns {name: figure} to log.
      allow_change: go on although the data set is not the one that the run was saved with.
      stop: a signals.Stop that may end the run after a step, whose state is then saved; None: nothing does.
    Returns: (trained, frozen), two dicts {path: array}; trained arrays are float32.
    Raises:
      NotFinite: `max_bad_steps` steps were skipped.
      CheckpointError: no checkpoint fits or can be read, or none can be written.
      ConfigError: the data set is another one, the mesh does not fit the batch or the devices, or a table
        (`train_parts`, AXES, DECAY) does not cover every parameter exactly once.
      Stopped: `stop` ended the run.
    """
    stop = stop or Stop()
    mesh = sharding.make_mesh(**vars(config.mesh))
    program = make_program(config, mesh)
    _, arrays = fill(config, mesh, given)
    trained, frozen = freeze.split(config.train_parts, arrays)
    del arrays
    trained, frozen = cast(trained, jnp.float32), cast(frozen, jnp.dtype(config.compute_dtype))
    print("\n".join(summary(trained, frozen)), flush=True)

    placed = jax.tree.map(lambda a: a.sharding, program.state)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    position = {"data": batches.state(), "interval": None}
    found = checkpoints.restore(program.state, placed)
    if found is not None:
        state, position = found
        same_data(position["data"], batches.state(), allow_change)
        batches.restore(position["data"])
        stop.step = int(state.step)
        if stop.step < config.steps:
            print(f"resuming from step {stop.step}", flush=True)
        else:
            print(f"all {stop.step} steps are done: nothing is left to train", flush=True)
    else:
        state = jax.jit(lambda p: init_state(program.optimizer, p), out_shardings=placed)(trained)
        write_config(config, workdir)
    del trained

    monitor = Monitor(workdir, config.steps, int(state.step), config.log_every, position["interval"])
    spread = batch_sharding(mesh)
    with stop.deferred():
        try:
            step = program.step
            state = run(
                config, workdir, step, state, frozen, batches, checkpoints, monitor, spread, on_eval, stop
            )
        finally:
            monitor.close()
            checkpoints.close()
    return state.params, frozen


def run(config, workdir, step, state, frozen, batches, checkpoints, monitor, placed, on_eval, stop):
    """Runs the steps that are left, and returns the last state.

    The metrics of step n are read only while step n + 1 runs, so that the device does not wait for that.
    When the run is asked to stop, the state of its last step is saved, and Stopped is raised again.
    """
    begun, unread = int(state.step), None
    read = functools.partial(report, config, monitor, before_run=int(state.bad_steps))

    def evaluates(n):
        return n and on_eval and config.eval.every_steps and n % config.eval.every_steps == 0

    def evaluate(n):
        with monitor.pause(), stop.deferred(False):
            monitor.log(n, on_eval({**state.params, **frozen}))

    def settle(n, saves):
        """Finishes step n: reads its metrics, and saves its state if `saves`."""
        jax.block_until_ready(state)  # this wait counts as time of the step
        read(unread)
        with monitor.pause():
            if saves:
                checkpoints.save(n, state, {"data": position, "interval": monitor.interval()})
                # Not before: until now the file was the config that the checkpoints were made with.
                write_config(config, workdir)
                stop.step = n

    def save():
        if done > begun:
            settle(done, saves=True)

    done, position, programs = begun, batches.state(), {}
    try:
        if evaluates(begun) and not monitor.evaluated(begun):
            evaluate(begun)  # the evaluation after the resumed step was cut off
        for n in range(begun + 1, config.steps + 1):
            stop.check()
            before = time.perf_counter()
            batch = following(batches, stop, save)
            monitor.wait += time.perf_counter() - before
            batch = jax.device_put(batch, placed)
            shapes = tuple(a.shape for a in jax.tree.leaves(batch))  # pools of media come in a few sizes
            if shapes not in programs:
                with monitor.pause(), jax.set_mesh(placed.mesh):
                    if programs:
                        print(f"step {n}: compiling for batches with another number of pictures", flush=True)
                    programs[shapes] = step.lower(state, frozen, batch).compile()
                    stop.check()
            if n == begun + 1:
                with monitor.pause():
                    batches.checked()  # bad data is reported before the first step
                    stop.check()
            with jax.set_mesh(placed.mesh), jax.transfer_guard("disallow"):
                state, metrics = programs[shapes](state, frozen, batch)
            done, position = n, batches.state()
            read(unread)
            unread = n, metrics, batches.counts()
            saves = checkpoints.due(n) or n == config.steps
            if saves or evaluates(n):
                settle(n, saves)
                unread = None
            if evaluates(n):
                evaluate(n)
    except Stopped:
        save()
        raise
    return state


def following(batches, stop, save):
    """The next batch. When there is none, calls `save` and raises the error again.

    Raises: Stopped when the run was asked to stop.
    """
    try:
        return next(batches)
    except Exception:
        # The signal that asks the run to stop may have ended worker processes too; that is no error.
        stop.check()
        save()
        if stop.step:
            print(
                f"no next batch: the state after step {stop.step} is saved, "
                "and the same command goes on from there",
                flush=True,
            )
        raise


def report(config, monitor, step, before_run):
    """Gives the metrics of a step to the monitor.

    Args:
      step: (number, {name: array}, counts of the data), or None when there is nothing to read.
      before_run: how many bad steps were skipped before this run.
    Raises: NotFinite when this run has had `max_bad_steps` bad steps.
    """
    if step is None:
        return
    n, arrays, counts = step
    metrics = {name: value.item() for name, value in jax.device_get(arrays).items()}
    monitor.step(n, metrics, counts)
    bad = metrics["bad"] - before_run
    if bad >= config.max_bad_steps:
        raise NotFinite(
            f"step {n}: {bad} steps had a NaN or infinite loss or gradient and were skipped; "
            f"max_bad_steps is {config.max_bad_steps}. "
            "Lower optimizer.learning_rate, check the data, or set compute_dtype=float32"
        )
