"""The fused attention of cuDNN, for NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import functools

import jax
import jax.numpy as jnp

from omnifusion_jax.nn.choice import Kernel
from omnifusion_jax.nn.kernels.fused import axis_of_heads, beyond, on_each_device
from omnifusion_jax.tables import KERNELS


def cudnn(q, k, v, spec, dropout, implementation="cudnn"):
    """See `attend.attend`; `implementation` is that of `jax.nn.dot_product_attention`.

    JAX offers no segment ids here. It needs none: a row is one segment and then padding, so that causal
    order alone hides the padding from every token of the segment.
    """
    causal, window = spec.query is not None, spec.within(q.shape[-2])
    attention = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )

    def kernel(q, k, v):
        q = jnp.moveaxis(q, 3, 1)  # [batch, query, kv_heads, group, head_dim]
        flat = q.reshape(*q.shape[:2], -1, q.shape[-1])
        y = attention(flat, k.swapaxes(1, 2), v.swapaxes(1, 2))
        return jnp.moveaxis(y.reshape(q.shape), 1, 3)

    return on_each_device(kernel, axis_of_heads(spec), q, k, v)


def refuses(need):
    """What of a Need cuDNN cannot do. Heads wider than 128 need a Hopper GPU, which is not asked about."""
    own = {
        "segments, which packed rows need": need.packed,
        need.dtype: need.dtype not in ("bfloat16", "float16"),
        f"head_dim {need.head_dim}": need.head_dim > 128 or need.head_dim % 8,
    }
    return beyond(need, own)


KERNELS["cudnn"] = Kernel(cudnn, refuses, platform="gpu")
