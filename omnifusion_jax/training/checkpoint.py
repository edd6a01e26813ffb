"""Saves and restores a run with Orbax: the training state and the position in the data."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from omnifusion_jax import hosts
from omnifusion_jax.config import CheckpointConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.paths import remote
from omnifusion_jax.training.workdir import writing

# Errors of tensorstore carry no errno, so they are recognised by their words.
UNREACHABLE = [os.strerror(n) for n in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)]


class Kept:
    """The policy of Orbax that keeps the `newest` checkpoints, and besides the one that `best` chooses."""

    def __init__(self, newest: int, best: Callable[[Iterable[int]], int | None]):
        self.newest, self.best = newest, best

    def should_preserve(self, checkpoints, *, context):
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in (*steps[-self.newest :], self.best(steps)) for step in steps]


class Checkpoints:
    """The checkpoints of a run in `WORKDIR/checkpoints/<step>`, written in the background.

    Args:
      best: chooses the best of some steps, which is kept beside the newest ones; None for none.
      read_only: nothing on the disk is changed.
    """

    def __init__(
        self,
        directory: Path,
        c: CheckpointConfig,
        best: Callable[[Iterable[int]], int | None] = lambda steps: None,
        read_only: bool = False,
    ):
        self.directory, self.every_steps, self.every_seconds = directory, c.every_steps, 60 * c.every_minutes
        self.read_only = read_only
        # Orbax removes what a killed run or a full disk left half written. It removes a finished checkpoint
        # only once a newer one is finished.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Kept(c.keep, best),
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        with writing(directory):
            self.manager = ocp.CheckpointManager(directory, options=options)
        self.saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the state after `step` should be saved, by the number of steps or by the clock."""
        by_time = self.every_seconds and time.monotonic() - self.saved_at >= self.every_seconds
        return bool(by_time or (self.every_steps and step % self.every_steps == 0))

    def save(self, step: int, state, position: dict):
        """Saves the state after `step`, unless it is saved already. `position` is JSON-serialisable.

        Raises: CheckpointError when this save failed, or the one before it.
        """
        if step == self.manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), position=ocp.args.JsonSave(position)
        )
        with writing(self.directory):
            hosts.by_first(self.check_place)
            self.manager.wait_until_finished()
            size = sum(a.nbytes for a in jax.tree.leaves(state))
            hosts.by_first(lambda: self.check_space(size))
            self.manager.save(step, args=items, force=True)
        self.saved_at = time.monotonic()

    def check_place(self):
        """Makes a directory: where none can be made, Orbax's threads would wait minutes for theirs."""
        if remote(self.directory):  # a store has no directories, and no end
            return
        probe = self.directory / "probe"
        probe.mkdir(exist_ok=True)
        probe.rmdir()

    def check_space(self, size: int):
        """Raises CheckpointError when a checkpoint of `size` bytes does not fit on the disk.

        Checked beforehand, this gives one message; while writing, every thread would give one.
        """
        if remote(self.directory):
            return
        free = shutil.disk_usage(self.directory).free
        if free < size:
            raise CheckpointError(
                f"{self.directory} cannot be written: a checkpoint needs {size:,} bytes, {free:,} are free. "
                "Finished checkpoints are whole. Make room, and run the same command again"
            )

    def restore(self, state, shardings, before: int | None = None):
        """Restores the newest checkpoint that can be read, on whatever devices there are now.

        Newer ones that cannot be read are reported and moved to `checkpoints.damaged`. With several hosts the
        run ends there, and goes on from the one before when it is started again: a host that has read its
        part waits in Orbax for all others.

        Args:
          state: a TrainState that gives the shapes and dtypes.
          shardings: a TrainState of shardings; the restored arrays are placed by them.
          before: only checkpoints of earlier steps than this one count; None: all do.
        Returns: (state, position), or None when there is no checkpoint.
        Raises:
          CheckpointError: no checkpoint can be read; or the newest cannot be reached, but may be whole; or
            one was made by a run with other shapes. Nothing is moved then.
        """
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
        )._asdict()
        damaged = {}
        steps = [step for step in self.manager.all_steps() if before is None or step < before]
        for step in sorted(steps, reverse=True):
            try:
                how = ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore()
                )
                found = self.manager.restore(step, args=how)
            except (MemoryError, jax.errors.JaxRuntimeError):
                raise  # the state is too large for this machine, which does not mean that it is damaged
            except Exception as error:  # a damaged file can make Orbax raise anything
                words = next((words for words in UNREACHABLE if words in str(error)), None)
                if words:
                    raise CheckpointError(
                        f"{self.directory}/{step} cannot be read now: {words}. It may be whole: "
                        "see to the disk or the permissions, and run the same command again"
                    ) from error
                self.same_shapes(step, target)
                damaged[step] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
                if hosts.count() > 1 and step > min(self.manager.all_steps()):
                    raise CheckpointError(
                        f"checkpoint {step} cannot be read ({damaged[step]}). "
                        f"It is kept as {self.moved(step)}; the same command goes on from the one before it"
                    ) from error
                continue
            self.set_aside(damaged, step)
            return type(state)(**found.state), found.position
        if damaged:
            lines = "".join(f"\n  {self.directory}/{step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"no checkpoint of this run can be read:{lines}\n"
                "Nothing was changed. Copy one of them back from where it is whole, "
                "or begin anew in another --workdir"
            )
        return None

    def same_shapes(self, step: int, target):
        """Raises CheckpointError when a checkpoint's arrays have other names or shapes than this run's.

        Such a checkpoint is not damaged: it belongs to another run.
        """
        try:
            stored = shapes(
                ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / "state").tree
            )
        except Exception:  # so damaged that not even the shapes can be read
            return
        needed = shapes(target)
        wrong = [
            f"\n  {path}: {stored.get(path, 'not there')}, needed {needed.get(path, 'nothing')}"
            for path in sorted(stored.keys() | needed.keys())
            if stored.get(path) != needed.get(path)
        ]
        if wrong:
            more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise CheckpointError(
                f"{self.directory}/{step} was made by a run of another model, freeze table or optimizer:"
                f"{''.join(wrong[:10])}{more}\n"
                "Give the settings that it was made with, or another --workdir for a new run"
            )

    def set_aside(self, damaged: dict[int, str], step: int):
        """Moves damaged checkpoints, {step: reason}, out of the way of new ones, and reports each."""
        for bad, reason in damaged.items():
            if self.read_only:
                print(f"checkpoint {bad} cannot be read ({reason}): that of step {step} is used", flush=True)
                continue
            print(
                f"checkpoint {bad} cannot be read ({reason}). It is kept as {self.moved(bad)}; "
                f"the run goes on from step {step}",
                flush=True,
            )
        if damaged and not self.read_only:
            self.manager.reload()

    def moved(self, step: int) -> Path:
        """Moves a checkpoint to `checkpoints.damaged`, unless another host has, and returns its place."""
        place = self.directory.with_name("checkpoints.damaged") / str(step)
        while place.exists():
            place = place.with_name(place.name + "_")
        with writing(place), contextlib.suppress(FileNotFoundError):
            place.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(place)
        return place

    def close(self):
        """Waits until everything is written. Raises CheckpointError when that failed."""
        with writing(self.directory):
            self.manager.close()


def restore_params(directory: Path, like: dict) -> dict:
    """The parameters alone of the checkpoint `directory`, {path: array}.

    Args:
      like: {path: array}, which gives shapes, dtypes and where the arrays lie.
    Raises: CheckpointError when they cannot be read.
    """
    shaped = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
    target = {"params": jax.tree.map(shaped, like)}
    how = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(directory / "state", args=how)["params"]
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # as in Checkpoints.restore
        raise CheckpointError(f"{directory} cannot be read: {type(error).__name__}: {error}") from error


def newest(directory: Path) -> int | None:
    """The step of the newest checkpoint in `directory`, whole or not; None when there is none."""
    return max(steps(directory), default=None)


def steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in `directory`, whole or not."""
    return [int(path.name) for path in directory.glob("[0-9]*") if path.name.isdigit()]


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the leaves of a tree that have a shape."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if getattr(leaf, "shape", None) is not None
    }
