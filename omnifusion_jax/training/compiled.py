"""The step of a run, compiled for each size of batch when the first of it comes."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from omnifusion_jax import hosts
from omnifusion_jax.training.program import Program
from omnifusion_jax.training.signals import Stop


class Compiled:
    """Gives the compiled step for a batch. Pools of media come in a few sizes, so that there are few.

    With several hosts all of them ask for the same one.

    Args:
      mesh: of the batches.
      pause: makes a context whose time is not that of a step.
      stop: is asked after each compilation.
    """

    def __init__(self, program: Program, mesh: Mesh, pause: Callable, stop: Stop):
        self.program, self.mesh, self.pause, self.stop = program, mesh, pause, stop
        self.steps = {}

    def __call__(self, n: int, state, frozen, batch) -> Callable:
        """The step for these arrays; `n` is its number, and what makes `state` may still run.

        Raises: Stopped when the run was asked to stop meanwhile.
        """
        shapes = tuple(a.shape for a in jax.tree.leaves(batch))
        if shapes not in self.steps:
            jax.block_until_ready(state)  # or the time of the step that runs would not be counted
            with self.pause(), jax.set_mesh(self.mesh):
                if self.steps:
                    print(f"step {n}: compiling for batches with another number of pictures", flush=True)
                self.steps[shapes] = self.program.step.lower(state, frozen, batch).compile()
                hosts.barrier()  # who compiles longer is waited for here, where it would be named
                self.stop.check()
        return self.steps[shapes]
