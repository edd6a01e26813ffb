"""Fused attention with segments for GPUs, which JAX ships (`jax.experimental.pallas.ops.gpu.attention`)."""

import functools

import jax
import jax.numpy as jnp

from omnifusion_jax.nn.choice import Kernel
from omnifusion_jax.nn.kernels.fused import axis_of_heads, beyond, lengthen, on_each_device
from omnifusion_jax.tables import KERNELS

BLOCK = 128  # sequences are multiples of it


def triton(q, k, v, spec, dropout, interpret=False):
    """See `attend.attend`; `interpret` runs the kernel on any device, slowly.

    Causal order counts places in the row; within a segment that is the order of positions.
    """
    from jax.experimental.pallas.ops.gpu.attention import mha  # slow to import

    length = q.shape[-2]
    if spec.query is not None:
        segments = (lengthen(spec.query.segments, 1, BLOCK),)
    elif length % BLOCK:  # what is added gets a segment of its own
        segments = (lengthen(jnp.ones((len(q), length), jnp.int32), 1, BLOCK),)
    else:
        segments = ()
    q, k, v = lengthen(q, 3, BLOCK), lengthen(k, 2, BLOCK), lengthen(v, 2, BLOCK)

    def kernel(q, k, v, *segments):
        one = functools.partial(
            mha,
            segment_ids=segments[0] if segments else None,
            sm_scale=q.shape[-1] ** -0.5,
            causal=spec.query is not None,
            interpret=interpret,
        )
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [batch, key, kv_heads, head_dim]
        # The kernel wants a key head for each query head. Mapped over the group, keys are not repeated.
        of_group = jax.vmap(lambda q: one(q.swapaxes(1, 2), k, v).swapaxes(1, 2), in_axes=2, out_axes=2)
        return of_group(q)

    return on_each_device(kernel, axis_of_heads(spec), q, k, v, *segments)[..., :length, :]


def refuses(need):
    """What of a Need this kernel cannot do."""
    own = {
        f"window {need.window}": need.window,
        "keys of another length": need.queries != need.keys,
        need.dtype: need.dtype not in ("bfloat16", "float16"),
    }
    return beyond(need, own)


KERNELS["triton"] = Kernel(triton, refuses, platform="gpu")
