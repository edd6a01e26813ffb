"""The only file that touches `flax.nnx`.

Modules are plain pytrees here. They pass through `jax.jit`, `jax.grad` and `jax.lax.scan` as they are, and
a forward pass changes nothing in them. Optimizers, checkpoints and sharding rules see their parameters as a
flat dict `{"decoder/layers/mlp/gate": array}`.
"""

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from omnifusion_jax.errors import CheckpointError

Module, Param, List, eval_shape = nnx.Module, nnx.Param, nnx.List, nnx.eval_shape


class Rngs:
    """Random keys for the parameters of a module: the same as those of `flax.nnx.Rngs`.

    That one counts keys in an array. This one counts in Python, so that a module is traced in half the time.
    """

    def __init__(self, seed: int | jax.Array):
        self.key = jax.random.key(seed) if isinstance(seed, int) else seed
        self.count = 0

    def params(self) -> jax.Array:
        """The next key."""
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)


def parameters(module: Module) -> dict[str, jax.Array]:
    """The module's arrays (or `ShapeDtypeStruct`s) by path, sorted."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module))}


def owner(module: Module, path: str) -> Module:
    """The module that holds the parameter at `path`."""
    for name in path.split("/")[:-1]:
        module = module[int(name)] if name.isdigit() else getattr(module, name)
    return module


def with_parameters(module: Module, arrays: Mapping[str, jax.Array]) -> Module:
    """A copy of `module`, which may be abstract, with the parameters `arrays` by path.

    Raises:
      CheckpointError: `arrays` has other paths than the module.
    """
    graph, state = nnx.split(module)
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    if missing := set(paths) ^ set(arrays):
        names = ", ".join(sorted(missing))
        raise CheckpointError(f"parameters given and parameters of {type(module).__name__} differ in {names}")
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), [arrays[path] for path in paths]))


def stacked(make: Callable[..., Module], n: int, rngs: Rngs) -> Module:
    """One module of `n` that `make(rngs=...)` makes; its arrays all have a leading `layers` axis."""
    return nnx.vmap(lambda key: make(rngs=Rngs(key)))(jax.random.split(rngs.params(), n))
