"""The training loop."""

import functools
import time

import jax
import jax.numpy as jnp

from omnifusion_jax import sharding
from omnifusion_jax.config import TrainConfig, check, part_of
from omnifusion_jax.errors import CheckpointError, OmniFusionError
from omnifusion_jax.models import lora
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.stack import HOST, offloads
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


def build(config: TrainConfig, *, rngs: nnx.Rngs):
    """The objective's module, with factors and scales beside its kernels where `config.lora` asks for them.

    Raises: ConfigError when `config.lora` does not fit the module or the freeze table.
    """
    module = OBJECTIVES[config.objective].module(config.model, rngs=rngs)
    paths = list(nnx.parameters(module))
    frozen = [path for path in paths if freeze.factor(config.train_parts, path) is None]
    both = sorted(set(lora.targets(config.lora, paths)) - set(frozen))
    check(
        not both,
        f"train_parts trains {', '.join(both[:3])} itself, and lora.targets gives it factors. "
        "Freeze it (None), or leave it out of lora.targets",
    )
    lora.add_factors(module, config.lora, rngs=rngs)
    if config.lora.base != "compute_dtype":
        lora.add_scales(module, frozen)
    return module


def fill(config: TrainConfig, mesh, given: dict):
    """Makes every parameter of a run, sharded over `mesh`.

    The parameters in `given`, {path: array}, are taken out of it and used as they are; the others are drawn
    from the seed.

    Returns: (the module that `build` makes, with shapes for parameters, {path: parameter}).
    Raises:
      CheckpointError: a given parameter has another shape than the module's.
      ConfigError: what `build` refuses.
    """
    skeleton = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
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
        arrays = nnx.parameters(build(config, rngs=nnx.Rngs(config.seed)))
        return {path: arrays[path] for path in missing}

    arrays = jax.jit(fresh, out_shardings=missing)()
    for path in shapes:
        if path in given:  # taken out, so that a large model is not held twice
            arrays[path] = jax.device_put(given.pop(path), placed[path])
    return skeleton, {path: arrays[path] for path in shapes}


def summary(trained: dict, frozen: dict) -> list[str]:
    """Lines that say which parts are trained and which are frozen, with their numbers of parameters."""
    lines = []
    frozen = {path: a for path, a in frozen.items() if not path.endswith("/kernel_scale")}
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
    stop, objective = stop or Stop(), OBJECTIVES[config.objective]
    mesh = sharding.make_mesh(**vars(config.mesh))
    examples = config.batch_size // config.grad_accum  # their rows stay together on one device
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    devices = f"{shards} devices (mesh.data * mesh.fsdp)"
    check(
        examples % shards == 0,
        f"batch_size / grad_accum is {examples} examples at a time, which {devices} cannot share evenly. "
        "Change one of them",
    )
    device = mesh.devices.flat[0]
    check(
        config.remat != "offload" or offloads(device),
        f"remat=offload: devices of {device.platform} have no {HOST} memory. Choose remat=full",
    )
    skeleton, arrays = fill(config, mesh, given)
    trained, frozen = freeze.split(config.train_parts, arrays)
    del arrays
    print("\n".join(summary(trained, frozen)), flush=True)
    dtype = jnp.dtype(config.compute_dtype)
    trained = cast(trained, jnp.float32)
    frozen = cast(lora.quantised(frozen, config.lora.base), dtype)
    frozen = jax.device_put(frozen, placements(mesh, frozen))

    optimizer = make_optimizer(config.optimizer, config.steps, config.train_parts)
    shapes = jax.eval_shape(lambda p: init_state(optimizer, p), trained)
    placed = state_shardings(mesh, shapes)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    position = {"data": batches.state(), "interval": None}
    found = checkpoints.restore(shapes, placed)
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
    spread = batch_sharding(mesh)
    with stop.deferred():
        try:
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
