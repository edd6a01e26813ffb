"""A few queries and many keys on a CPU, whose scores are sums of products rather than a product of matrices.

XLA multiplies a matrix of a few rows with each head's keys several times slower than it reads them.
"""

import math

import jax
import jax.numpy as jnp

from omnifusion_jax.nn.attend import dense
from omnifusion_jax.nn.choice import Kernel
from omnifusion_jax.nn.kernels.fused import first
from omnifusion_jax.tables import KERNELS

MOST = 16  # queries of a head of keys
WORTH = 2**15  # keys of all heads and rows from which on it is faster
PART = 8  # of head_dim: parts are added to each other first, as a CPU adds vectors


def few(q, k, v, spec, dropout):
    """See `attend.attend`; what a product of matrices does better is left to `dense`."""
    group, queries, size = q.shape[2:]
    if not 1 < group * queries <= MOST or math.prod(k.shape[:3]) < WORTH:
        return dense(q, k, v, spec, dropout)
    in_parts = lambda a: a.reshape(*a.shape[:2], -1, size // PART, PART)
    products = in_parts(q)[:, :, :, None] * in_parts(k)[:, :, None]
    scores = products.sum(-2).sum(-1) * size**-0.5  # [batch, kv_heads, group * queries, key]
    if (mask := spec.mask()) is not None:
        seen = jnp.tile(mask, (1, group, 1))[:, None]
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bkts,bksd->bktd", probabilities, v).reshape(q.shape)


def refuses(need):
    """What of a Need this kernel cannot do."""
    return first(
        {
            "a sequence that attends to itself": not need.cache,
            f"{need.queries} queries": need.queries > MOST,
            f"head_dim {need.head_dim}": need.head_dim % PART,
            "dropout": need.dropout,
            need.dtype: need.dtype != "float32",
        }
    )


KERNELS["few"] = Kernel(few, refuses, platform="cpu")
