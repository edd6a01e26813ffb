"""What fused kernels share: their limits, padding, and how they run on many devices."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from omnifusion_jax import sharding


def beyond(need, own=None):
    """What of a Need a fused kernel cannot do, in a few words, or None.

    `own` are limits of the kernel beside those that all of them have: {words: whether that is asked for}.
    """
    limits = {
        "dropout": need.dropout,
        "blocks of tokens that see each other": need.hidden == "blocks",
        "cache": need.cache,
    }
    return first(limits | (own or {}))


def first(limits):
    """The first of {words: whether that is asked for} that is asked for, or None."""
    return next((words for words, asked in limits.items() if asked), None)


def lengthen(a, axis: int, multiple: int, value=0):
    """Pads an axis at its end with `value`, up to the next multiple of `multiple`."""
    widths = [(0, 0)] * a.ndim
    widths[axis] = (0, -a.shape[axis] % multiple)
    return jnp.pad(a, widths, constant_values=value)


def on_each_device(kernel, heads: str, q, k, v, *segments):
    """kernel(q, k, v, *segments) with every device working on its part of the batch and of the heads.

    Under `jax.set_mesh` the compiler spreads other computations by itself, but it cannot cut a kernel.

    Args:
      heads: the logical axis of the heads.
      q: [batch, kv_heads, group, query, head_dim]; k and v are [batch, kv_heads, key, head_dim].
      segments: arrays int32[batch, n].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, *segments)
    specs = [shares(mesh, heads, a.shape) for a in (q, k, v, *segments)]
    run = jax.shard_map(kernel, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
    return run(q, k, v, *segments)


def shares(mesh, heads: str, shape) -> PartitionSpec:
    """How an array [batch, ...] or [batch, kv_heads, ...] is cut into parts.

    Mesh axes of one device are named too: a gradient is summed over every axis that is not named, which for
    these would be a collective that does nothing.
    """
    names = ("batch", heads if len(shape) > 2 else None, None, None, None)[: len(shape)]
    rows, *rest = sharding.spec(mesh, names, shape)
    rows = rows or ()
    alone = (axis for axis, size in mesh.shape.items() if size == 1 and axis not in rows)
    return PartitionSpec((*rows, *alone) or None, *rest)


def axis_of_heads(spec) -> str:
    """Decoders, whose tokens have segments, may spread their heads; encoders spread pictures alone."""
    return "heads" if spec.query is None else "kv_heads"
