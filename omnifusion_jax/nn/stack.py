"""A stack of layers in two forms: one scanned module for training, a list of layers for decoding."""

import jax
from jax.ad_checkpoint import checkpoint_name

from omnifusion_jax.nn import nnx

INPUT, HOST = "layer_input", "pinned_host"
POLICIES = jax.checkpoint_policies
REMAT = {  # what the backward pass keeps of a layer's forward pass, beside the layer's input
    "none": lambda f: f,
    "dots": lambda f: jax.checkpoint(f, policy=POLICIES.dots_with_no_batch_dims_saveable),
    "full": jax.checkpoint,
    # nothing, as "full"; and the inputs wait in the memory of the host
    "offload": lambda f: jax.checkpoint(
        lambda layer, x, item: f(layer, checkpoint_name(x, INPUT), item),
        policy=POLICIES.save_and_offload_only_these_names(
            names_which_can_be_saved=(),
            names_which_can_be_offloaded=(INPUT,),
            offload_src="device",
            offload_dst=HOST,
        ),
    ),
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


def offloads(device: jax.Device) -> bool:
    """Whether a device can put arrays into the memory of its host, as remat "offload" does."""
    return any(memory.kind == HOST for memory in device.addressable_memories())


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
