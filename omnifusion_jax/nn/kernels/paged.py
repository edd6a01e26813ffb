"""Paged attention, the kernel for decoding on TPUs that JAX ships (`jax.experimental.pallas.ops.tpu`).

It reads what a row holds, where `dense` reads the whole length of the cache. To it each head of keys of each
row is a sequence of its own, whose pages stand side by side, and the query heads that share it are the only
ones: so it takes the cache as it lies.
"""

import jax.numpy as jnp

from omnifusion_jax.nn.choice import Kernel
from omnifusion_jax.nn.kernels.fused import axis_of_heads, first, on_each_device
from omnifusion_jax.tables import KERNELS

LANES = 128  # head_dim is a multiple of it
ROWS = 16  # columns of a page are a multiple of it
PAGE = 512  # columns of a page at most: two of keys and two of values are on the chip at a time


def paged(q, k, v, spec, dropout):
    """See `attend.attend`. What a query sees must be the first columns of its row."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention  # slow to import

    seen = spec.mask().sum(-1, dtype=jnp.int32)  # [batch, 1]

    def kernel(q, k, v, seen):
        (rows, heads, group, _, size), length = q.shape, k.shape[2]
        page = max(n for n in range(ROWS, PAGE + 1, ROWS) if length % n == 0)
        cut = lambda a: a.reshape(1, -1, page, size)
        y = paged_attention(
            q.reshape(rows * heads, group, size).astype(jnp.float32) * size**-0.5,
            cut(k),
            cut(v),
            jnp.repeat(seen[:, 0], heads),
            jnp.arange(rows * heads * length // page, dtype=jnp.int32).reshape(rows * heads, -1),
            pages_per_compute_block=1,
        )
        return y.reshape(q.shape).astype(q.dtype)

    return on_each_device(kernel, axis_of_heads(spec), q, k, v, seen)


def refuses(need):
    """What of a Need this kernel cannot do."""
    return first(
        {
            "a sequence that attends to itself": not need.cache,
            "several queries": need.queries > 1,
            "dropout": need.dropout,
            "blocks of tokens that see each other": need.hidden == "blocks",
            "a mask of its own": need.hidden == "others",
            f"window {need.window}": need.window,
            f"head_dim {need.head_dim}": need.head_dim % LANES,
            f"{need.keys} keys, no multiple of {ROWS}": need.keys % ROWS,
            need.dtype: need.dtype != "bfloat16",  # it rounds keys and values to it
        }
    )


KERNELS["paged"] = Kernel(paged, refuses, platform="tpu")
