"""The training loop."""

import functools
import itertools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax import hosts, sharding
from omnifusion_jax.config import TrainConfig, check, of_encoders, part_of, to_json
from omnifusion_jax.data.pipeline import counted, merged
from omnifusion_jax.errors import CheckpointError, HostError
from omnifusion_jax.models import lora
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.training import freeze, meters
from omnifusion_jax.training.bad_steps import BadSteps
from omnifusion_jax.training.checkpoint import Checkpoints
from omnifusion_jax.training.compiled import Compiled
from omnifusion_jax.training.evaluating import Evaluations
from omnifusion_jax.training.monitor import Monitor
from omnifusion_jax.training.profile import Span, Trace
from omnifusion_jax.training.program import Program, build, make_program
from omnifusion_jax.training.resume import same_data, same_versions, versions, write_config
from omnifusion_jax.training.signals import Stop, Stopped
from omnifusion_jax.training.step import TrainState, batch_sharding, init_state
from omnifusion_jax.training.weights_and_biases import WeightsAndBiases


def fill(config: TrainConfig, mesh, given: dict, features=()):
    """Makes every parameter of a run, sharded over `mesh`.

    The parameters in `given`, {path: array}, are taken out of it and used as they are; the others are drawn
    from the seed. Encoders of the streams in `features` are left out.

    Returns: (the module that `build` makes, with shapes for parameters, {path: parameter}).
    Raises:
      CheckpointError: a given parameter has another shape than the module's.
      ConfigError: what `build` refuses.
    """
    skeleton = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    shapes = nnx.parameters(skeleton)
    shapes = {path: a for path, a in shapes.items() if not of_encoders(path, features)}
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


def starting(config: TrainConfig, mesh, given: dict, features=()) -> tuple[dict, dict]:
    """(trained, frozen): the parameters before the first step, in the dtypes that a run keeps them in.

    Arguments and errors as in `fill`. What is trained, frozen and left out is printed.
    """
    skeleton, arrays = fill(config, mesh, given, features)
    trained, frozen = (
        {path: arrays[path] for path in half if path in arrays}
        for half in freeze.split(config.train_parts, nnx.parameters(skeleton))
    )
    del arrays  # so that no kernel is held both as it was and as integers
    lines = [f"left out {name}/encoders: the data hold what they would make" for name in features]
    print("\n".join(summary(trained, frozen) + lines), flush=True)
    trained = cast(trained, jnp.float32)
    frozen = cast(lora.quantised(frozen, config.lora.base), jnp.dtype(config.compute_dtype))
    frozen = jax.device_put(frozen, placements(mesh, frozen))
    return trained, frozen


def streams(batches) -> tuple[str, ...]:
    """The streams whose media the batches hold as features of their encoders."""
    made = getattr(batches, "features", None)
    return tuple(made["streams"]) if made else ()


def begin(program: Program, trained: dict) -> TrainState:
    """The state before the first step."""
    placed = jax.tree.map(lambda a: a.sharding, program.state)
    return jax.jit(lambda p: init_state(program.optimizer, p), out_shardings=placed)(trained)


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
    placed = jax.tree.map(lambda a: a.sharding, program.state)
    hosts.barrier()  # the first collective follows, and hosts may have taken more or less long to load
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, evaluations.best)
    position = {"data": batches.state(), "interval": None}
    found = checkpoints.restore(program.state, placed)
    if found is not None:
        state, position = found
        same_data(position["data"], batches.state(), allow_change)
        same_versions(position["versions"])
        batches.restore(position["data"])
        stop.step = int(state.step)
        if stop.step < config.steps:
            print(f"resuming from step {stop.step}", flush=True)
        else:
            print(f"all {stop.step} steps are done: nothing is left to train", flush=True)
    else:
        state = begin(program, trained)
        hosts.by_first(lambda: write_config(config, workdir))
    del trained

    monitor = Monitor(
        workdir,
        config.steps,
        int(state.step),
        config.log_every,
        position["interval"],
        meters.peak(config, mesh, tell),
        functools.partial(meters.memory, mesh.local_devices),
        [WeightsAndBiases(config, workdir)] if config.wandb and hosts.first() else [],
    )
    trace = Trace(workdir, profile, int(state.step), monitor.pause)
    evaluations.resume(workdir)
    with stop.deferred():
        try:
            state = run(
                config,
                workdir,
                program,
                state,
                frozen,
                batches,
                checkpoints,
                monitor,
                evaluations,
                stop,
                trace,
            )
            params = state.params
            del state  # its moments leave room for the last evaluation
            with stop.deferred(False):
                evaluations(config.steps, {**params, **frozen}, monitor)
        finally:
            monitor.close()
            checkpoints.close()
    return params, frozen


def run(config, workdir, program, state, frozen, batches, checkpoints, monitor, evaluations, stop, trace):
    """Runs the steps that are left, and returns the last state.

    The metrics of step n are read only while step n + 1 runs, so that the device does not wait for that.
    When the run is asked to stop, the state of its last step is saved, and Stopped is raised again.
    """
    begun, unread, paths = int(state.step), None, sorted(state.params)
    placed = batch_sharding(sharding.mesh_of(state.params.values()))
    owners = sharding.owners(sharding.shares(placed.mesh, config.batch_size))
    bad_steps = BadSteps(workdir, config.max_bad_steps, begun, int(state.bad_steps))
    compiled = Compiled(program, placed.mesh, monitor.pause, stop)
    read = functools.partial(report, monitor, bad_steps, batches, paths, owners)
    about = {"config": json.loads(to_json(config)), "versions": versions()}

    def evaluate(n):
        with monitor.pause(), stop.deferred(False):
            evaluations(n, {**state.params, **frozen}, monitor)

    def settle(n, saves):
        """Finishes step n: reads its metrics, and saves its state if `saves`."""
        jax.block_until_ready(state)  # this wait counts as time of the step
        read(unread)
        with monitor.pause():
            if saves:
                monitor.keep()
                whole = merged(hosts.gather(position))
                checkpoints.save(n, state, {"data": whole, "interval": monitor.interval(), **about})
                # Not before: until now the file was the config that the checkpoints were made with.
                hosts.by_first(lambda: write_config(config, workdir))
                stop.step = n

    def save():
        if done > begun:
            settle(done, saves=True)

    done, position = begun, batches.state()
    try:
        if evaluations.due(begun) and not hosts.by_first(lambda: monitor.evaluated(begun)):
            evaluate(begun)  # the evaluation after the resumed step was cut off
        for n in range(begun + 1, config.steps + 1):
            stop.check()
            before = time.perf_counter()
            batch, due, counts = following(batches, stop, save, checkpoints.due(n), owners)
            monitor.wait += time.perf_counter() - before
            rows_as_promised(config, batch)
            batch = jax.make_array_from_process_local_data(placed, batch)
            step = compiled(n, state, frozen, batch)
            if n == begun + 1:
                with monitor.pause():
                    batches.checked()  # bad data is reported before the first step
                    stop.check()
            trace.before(n, state)
            with jax.set_mesh(placed.mesh), jax.transfer_guard("disallow"), trace.during(n):
                state, metrics = step(state, frozen, batch)
            done, position = n, batches.state()
            trace.after(n, state)
            read(unread)
            unread = n, metrics, counts, batches.plan
            saves = due or n == config.steps or evaluations.decides(n)
            if saves or evaluations.due(n):
                settle(n, saves)
                unread = None
            if evaluations.due(n):
                evaluate(n)
    except Stopped:
        save()
        raise
    finally:
        trace.close(done)  # of a run that ends within the span
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
