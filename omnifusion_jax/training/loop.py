"""The training loop."""

import functools
import time

import jax
import jax.numpy as jnp

from omnifusion_jax import sharding
from omnifusion_jax.config import check, part_of
from omnifusion_jax.errors import CheckpointError, OmniFusionError
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import freeze
from omnifusion_jax.training.checkpoint import Checkpoints
from omnifusion_jax.training.monitor import Monitor
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.resume import same_data, write_config
from omnifusion_jax.training.signals import Stop, Stopped
from omnifusion_jax.training.step import batch_sharding, init_state, make_step, state_shardings


class NotFinite(OmniFusionError):
    """Too many steps had a NaN or infinite loss."""


def fill(config, mesh, given):
    """Every parameter of the run, sharded: `given` ones as they are, the others fresh from the seed."""
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
    arrays |= {
        path: jax.device_put(given.pop(path), placed[path]) for path in shapes if path in given
    }  # a large model is not held twice
    return skeleton, {path: arrays[path] for path in shapes}


def summary(trained, frozen):
    """Lines that say what is trained and what is not, with counts."""
    lines = []
    for name, arrays in (("trained", trained), ("frozen", frozen)):
        for part in sorted(set(map(part_of, arrays))):
            lines.append(
                f"{name:8} {part:16} {sum(a.size for path, a in arrays.items() if part_of(path) == part):>15,}"
            )
    return lines


def train(config, workdir, batches, given, on_eval=None, allow_change=False, stop=None):
    """Runs `config.steps` steps, resuming from `workdir` when it holds a checkpoint.

    Args:
      batches: iterator with `state()`, `restore(state)` and `checked()`, as data.pipeline.Batches.
      given: parameters by path to start from, taken out of the dict; the others are drawn.
      on_eval: called as on_eval(arrays) every `eval.every_steps` steps; what it returns, figures by name, is logged.
      allow_change: go on although the data set has another number of records than when the run was saved.
      stop: a signals.Stop that may end the run after a step, whose state is then saved; None: nothing does.
    Returns: (trained, frozen), arrays by path; trained ones are float32.
    Raises: NotFinite after `max_bad_steps` skipped steps; CheckpointError where no checkpoint fits or can be read, or none can be written;
      ConfigError for another data set; Stopped.
    """
    stop, objective = stop or Stop(), OBJECTIVES[config.objective]
    mesh = sharding.make_mesh(**vars(config.mesh))
    rows, shards = (
        config.batch_size * objective.rows // config.grad_accum,
        mesh.shape["data"] * mesh.shape["fsdp"],
    )
    devices = f"{shards} devices (mesh.data * mesh.fsdp)"
    check(
        rows % shards == 0,
        f"batch_size / grad_accum is {rows} rows at a time, which {devices} cannot share evenly. Change one of them",
    )
    skeleton, arrays = fill(config, mesh, given)
    trained, frozen = freeze.split(config.train_parts, arrays)
    del arrays
    dtype = jnp.dtype(config.compute_dtype)
    trained, frozen = cast(trained, jnp.float32), cast(frozen, dtype)
    print("\n".join(summary(trained, frozen)), flush=True)

    optimizer = make_optimizer(config.optimizer, config.steps, config.train_parts)
    shapes = jax.eval_shape(lambda p: init_state(optimizer, p), trained)
    placed = state_shardings(mesh, shapes)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    position = {"data": batches.state(), "interval": None}
    if (found := checkpoints.restore(shapes, placed)) is not None:
        state, position = found
        same_data(position["data"], batches.state(), allow_change)
        batches.restore(position["data"])
        stop.step = int(state.step)
        left = (
            f"resuming from step {stop.step}"
            if stop.step < config.steps
            else f"all {stop.step} steps are done: nothing is left to train"
        )
        print(left, flush=True)
    else:
        state = jax.jit(lambda p: init_state(optimizer, p), out_shardings=placed)(trained)
        write_config(config, workdir)
    del trained

    step = make_step(
        skeleton,
        objective,
        optimizer,
        seed=config.seed,
        grad_accum=config.grad_accum,
        dtype=dtype,
        remat=config.remat,
        loss_mean_rows=config.loss_mean_rows,
    )
    step = jax.jit(step, donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh)))
    monitor = Monitor(workdir, config.steps, int(state.step), config.log_every, position["interval"])
    with stop.deferred():
        try:
            state = run(
                config,
                workdir,
                step,
                state,
                frozen,
                batches,
                checkpoints,
                monitor,
                batch_sharding(mesh),
                on_eval,
                stop,
            )
        finally:
            monitor.close()
            checkpoints.close()
    return state.params, frozen


def run(config, workdir, step, state, frozen, batches, checkpoints, monitor, placed, on_eval, stop):
    """Dispatches steps ahead of reading their metrics: those of step n are read while n + 1 runs.

    Where the run is asked to stop, the last step's state is saved, and Stopped goes on.
    """
    begun, unread = int(state.step), None
    read = functools.partial(report, config, monitor, before_run=int(state.bad_steps))

    def evaluates(n):
        return n and on_eval and config.eval.every_steps and n % config.eval.every_steps == 0

    def evaluate(n):
        with monitor.pause(), stop.deferred(False):
            monitor.log(n, on_eval({**state.params, **frozen}))

    def settle(n, saves):
        """Everything of step n: its metrics read, its state saved."""
        jax.block_until_ready(state)  # the time it takes is the step's
        read(unread)
        with monitor.pause():
            if saves:
                checkpoints.save(n, state, {"data": position, "interval": monitor.interval()})
                write_config(
                    config, workdir
                )  # not before: until now the checkpoints were of the config that stood there
                stop.step = n

    def save():
        if done > begun:
            settle(done, saves=True)

    done, position, programs = begun, batches.state(), {}
    try:
        if evaluates(begun) and not monitor.evaluated(begun):
            evaluate(begun)  # it was cut off
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
                    batches.checked()  # what is wrong with the data shows before the first step
                    stop.check()
            with jax.set_mesh(placed.mesh), jax.transfer_guard("disallow"):
                state, metrics = programs[shapes](state, frozen, batch)
            done, position = n, batches.state()
            read(unread)
            unread = n, metrics
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
    """The next batch; where there is none, what was learned so far is saved before the error goes on.

    Worker processes may have been stopped by the signal that is to stop the run: their failure is then no error.
    """
    try:
        return next(batches)
    except Exception:
        stop.check()
        save()
        if stop.step:
            print(
                f"no next batch: the state after step {stop.step} is saved, and the same command goes on from there",
                flush=True,
            )
        raise


def report(config, monitor, step, before_run):
    """Reads the metrics of `step`, a pair (number, arrays) or None; raises NotFinite when too many steps of this run were bad."""
    if step is None:
        return
    n, metrics = step[0], {name: value.item() for name, value in jax.device_get(step[1]).items()}
    monitor.step(n, metrics)
    if (bad := metrics["bad"] - before_run) >= config.max_bad_steps:
        raise NotFinite(
            f"step {n}: {bad} steps had a NaN or infinite loss or gradient and were skipped; max_bad_steps is {config.max_bad_steps}. "
            "Lower optimizer.learning_rate, check the data, or set compute_dtype=float32"
        )
