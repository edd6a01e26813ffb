"""The only file that touches `flax.nnx`.

Modules are plain pytrees here. They pass through `jax.jit`, `jax.grad` and `jax.lax.scan` as they are, and
a forward pass changes nothing in them. Optimizers, checkpoints and sharding rules see their parameters as a
flat dict `{"decoder/layers/mlp/gate": array}`.
"""

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from omnifusion_jax.errors import CheckpointError

Module, Param, Rngs, List, eval_shape = nnx.Module, nnx.Param, nnx.Rngs, nnx.List, nnx.eval_shape


def parameters(module: Module) -> dict[str, jax.Array]:
    """The module's arrays (or `ShapeDtypeStruct`s) by path, sorted."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module))}


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
    return nnx.vmap(lambda r: make(rngs=r))(rngs.split(n))
