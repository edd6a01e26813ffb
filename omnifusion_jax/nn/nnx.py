"""The only file that touches `flax.nnx`.

Modules are plain pytrees here: they go through `jax.jit`, `jax.grad` and `jax.lax.scan` as they are, a forward pass changes nothing in them, and
outside of them parameters are a flat dict `{"decoder/layers/mlp/gate": array}`, which is what optimizers, checkpoints and sharding rules see.
"""

import jax
from flax import nnx

from omnifusion_jax.errors import CheckpointError

Module, Param, Rngs, List, eval_shape = nnx.Module, nnx.Param, nnx.Rngs, nnx.List, nnx.eval_shape


def parameters(module):
    """The module's arrays (or `ShapeDtypeStruct`s) by path, sorted as the module declares them."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(module))}


def with_parameters(module, arrays):
    """A copy of `module` (which may be abstract) that holds `arrays`, a dict by path covering every parameter exactly."""
    graph, state = nnx.split(module)
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    if missing := set(paths) ^ set(arrays):
        raise CheckpointError(
            f"parameters given and parameters of {type(module).__name__} differ in {', '.join(sorted(missing))}"
        )
    return nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(state), [arrays[path] for path in paths]))


def stacked(make, n, rngs):
    """`n` modules made by `make(rngs=...)`, as one module whose every array has a leading `layers` axis."""
    return nnx.vmap(lambda r: make(rngs=r))(rngs.split(n))
