"""Saving and resuming a run: the training state and the position in the data, by Orbax."""

import jax
import orbax.checkpoint as ocp

from omnifusion_jax.errors import CheckpointError


class Checkpoints:
    """`WORKDIR/checkpoints/<step>`, written in the background. `every` and `keep` as in CheckpointConfig."""

    def __init__(self, directory, every, keep):
        self.every = every
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.manager = ocp.CheckpointManager(directory, options=options)

    def due(self, step):
        return step % self.every == 0 and step != self.manager.latest_step()

    def save(self, step, state, data):
        """`data` is the JSON-serialisable position in the data."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data))
        self.manager.save(step, args=items, force=True)

    def restore(self, state, shardings):
        """The newest (state, data position), placed as `shardings` says on whatever devices there are now, or None. `state` gives the shapes."""
        step = self.manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)
        try:
            found = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target._asdict()), data=ocp.args.JsonRestore()))
        except (ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.manager.directory}/{step} was made by a run of another model, freeze table or optimizer. Use a fresh --workdir. ({error})"
            ) from error
        return type(state)(**found.state), found.data

    def close(self):
        self.manager.wait_until_finished()
        self.manager.close()
