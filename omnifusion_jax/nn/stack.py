"""A stack of layers in two forms: one scanned module for training, a list of layers for decoding."""

import jax

from omnifusion_jax.nn import nnx

REMAT = {  # what the backward pass keeps of a layer's forward pass
    "none": lambda f: f,
    "dots": lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
}

# Stacks of up to this many layers are unrolled: it makes a small model's step 15 % faster, and the step
# still compiles in seconds.
SHALLOW = 6


def run_stack(stack, x, step, per_layer=None, remat="none"):
    """Runs `x, y = step(layer, x, per_layer[i])` layer by layer; returns the last x and every y.

    A stacked module is scanned, which compiles fast and takes little memory; its ys come back stacked. In a
    list, no weight is sliced, and hence none is copied, for each decoded token; its ys come back as a list.
    `remat` is a row of REMAT.
    """
    step = REMAT[remat](step)
    if not isinstance(stack, nnx.List):
        depth = jax.tree.leaves(stack)[0].shape[0]
        unroll = depth if 0 < depth <= SHALLOW else 1
        return jax.lax.scan(lambda x, item: step(item[0], x, item[1]), x, (stack, per_layer), unroll=unroll)
    ys = []
    for i, layer in enumerate(stack):
        x, y = step(layer, x, None if per_layer is None else per_layer[i])
        ys.append(y)
    return x, ys


def first_layers(stack, n):
    """The first `n` layers, in either form."""
    return part(stack, slice(0, n))


def last_layers(stack, start):
    """The layers from index `start` on, in either form."""
    return part(stack, slice(start, None))


def part(stack, here):
    if isinstance(stack, nnx.List):
        return nnx.List(list(stack)[here])
    depth = jax.tree.leaves(stack)[0].shape[0]
    if here.indices(depth) == (0, depth, 1):
        return stack  # slicing all of it would make a copy
    return jax.tree.map(lambda a: a[here], stack)


def unstack(stack) -> nnx.List:
    """The list form of a stacked module."""
    depth = jax.tree.leaves(stack)[0].shape[0]
    return nnx.List([jax.tree.map(lambda a, i=i: a[i], stack) for i in range(depth)])
