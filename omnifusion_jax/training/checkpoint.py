"""Saving and resuming a run: the training state and the position in the data, by Orbax."""

import errno
import os
import shutil
import time

import jax
import orbax.checkpoint as ocp

from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.training.workdir import writing

# by their words: errors of tensorstore carry no errno
UNREACHABLE = [os.strerror(n) for n in (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)]


class Checkpoints:
    """`WORKDIR/checkpoints/<step>`, written in the background. `c` is a CheckpointConfig."""

    def __init__(self, directory, c):
        self.directory, self.every_steps, self.every_seconds = directory, c.every_steps, 60 * c.every_minutes
        # what a killed run or a full disk left half written goes; finished checkpoints go only once a newer one is finished
        options = ocp.CheckpointManagerOptions(
            max_to_keep=c.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        with writing(directory):
            self.manager = ocp.CheckpointManager(directory, options=options)
        self.saved_at = time.monotonic()

    def due(self, step):
        by_time = self.every_seconds and time.monotonic() - self.saved_at >= self.every_seconds
        return bool(by_time or (self.every_steps and step % self.every_steps == 0))

    def save(self, step, state, position):
        """Unless that step is there. `position` is JSON-serialisable. Raises CheckpointError for this or the save before, if it failed."""
        if step == self.manager.latest_step():
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), position=ocp.args.JsonSave(position)
        )
        with writing(self.directory):
            probe = (
                self.directory / "probe"
            )  # where no directory can be made, Orbax's threads would wait minutes for theirs
            probe.mkdir(exist_ok=True)
            probe.rmdir()
            self.manager.wait_until_finished()
            self.check_space(sum(a.nbytes for a in jax.tree.leaves(state)))
            self.manager.save(step, args=items, force=True)
        self.saved_at = time.monotonic()

    def check_space(self, size):
        """Raises CheckpointError where a checkpoint of `size` bytes does not fit: said beforehand, it is one message and not one a thread."""
        if (free := shutil.disk_usage(self.directory).free) < size:
            raise CheckpointError(
                f"{self.directory} cannot be written: a checkpoint needs {size:,} bytes, {free:,} are free. Finished checkpoints are whole. "
                "Make room, and run the same command again"
            )

    def restore(self, state, shardings):
        """The newest (state, position) that can be read, placed as `shardings` says on whatever devices there are now, or None.

        Newer ones that cannot be read are named, and kept under `checkpoints.damaged`. `state` gives the shapes.

        Raises:
          CheckpointError: none of them can be read, the newest may be whole but is out of reach, or one was made by a run of other
            shapes. Nothing is moved then.
        """
        target = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
        )._asdict()
        damaged = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                how = ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), position=ocp.args.JsonRestore()
                )
                found = self.manager.restore(step, args=how)
            except (
                MemoryError,
                jax.errors.JaxRuntimeError,
            ):  # too large for this machine, and not to blame for it
                raise
            except Exception as error:  # Orbax raises whatever the damaged file led it to
                if words := next((words for words in UNREACHABLE if words in str(error)), None):
                    raise CheckpointError(
                        f"{self.directory}/{step} cannot be read now: {words}. It may be whole: see to the disk or the permissions, and run "
                        "the same command again"
                    ) from error
                self.same_shapes(step, target)
                damaged[step] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"
                continue
            self.set_aside(damaged, step)
            return type(state)(**found.state), found.position
        if damaged:
            lines = "".join(f"\n  {self.directory}/{step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"no checkpoint of this run can be read:{lines}\n"
                "Nothing was changed. Copy one of them back from where it is whole, or begin anew in another --workdir"
            )
        return None

    def same_shapes(self, step, target):
        """Raises CheckpointError where the arrays of a checkpoint have other names or shapes than those of this run: it is not damaged then."""
        try:
            stored = shapes(
                ocp.StandardCheckpointHandler().metadata(self.directory / str(step) / "state").tree
            )
        except Exception:  # damaged so much that not even that can be read
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
                f"{self.directory}/{step} was made by a run of another model, freeze table or optimizer:{''.join(wrong[:10])}{more}\n"
                "Give the settings that it was made with, or another --workdir for a new run"
            )

    def set_aside(self, damaged, step):
        """Moves damaged checkpoints out of the way of those to come, and says so."""
        for bad, reason in damaged.items():
            place = self.directory.with_name("checkpoints.damaged") / str(bad)
            while place.exists():
                place = place.with_name(place.name + "_")
            with writing(place):
                place.parent.mkdir(exist_ok=True)
                (self.directory / str(bad)).rename(place)
            print(
                f"checkpoint {bad} cannot be read ({reason}). It is kept as {place}; the run goes on from step {step}",
                flush=True,
            )
        if damaged:
            self.manager.reload()

    def close(self):
        """Waits for what is being written. Raises CheckpointError when that failed."""
        with writing(self.directory):
            self.manager.close()


def newest(directory):
    """The step of the newest checkpoint in `directory`, whole or not; None where there is none."""
    steps = [int(path.name) for path in directory.glob("[0-9]*") if path.name.isdigit()]
    return max(steps, default=None)


def shapes(tree):
    """{path: shape} of what has a shape."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if getattr(leaf, "shape", None) is not None
    }
