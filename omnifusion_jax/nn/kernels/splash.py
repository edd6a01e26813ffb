"""Splash attention, the fused kernel for TPUs that JAX ships (`jax.experimental.pallas.ops.tpu`).

What is hidden whatever the data (the later tokens, those before the window) is never computed, and segment
ids hide the rest. It counts places in the row instead of positions: a segment's tokens stand side by side,
so that within a segment both order tokens alike and are equally far apart.
"""

import jax
import jax.numpy as jnp

from omnifusion_jax.nn.choice import Kernel
from omnifusion_jax.nn.kernels.fused import axis_of_heads, beyond, lengthen, on_each_device
from omnifusion_jax.tables import KERNELS

LANES = 128  # sequences are multiples of it
BLOCK = 640  # the longest piece of a sequence that is computed at once


def splash(q, k, v, spec, dropout, interpret=False):
    """See `attend.attend`; `interpret` runs the kernel on any device, slowly.

    The sequences are padded to multiples of 128. No real token sees what is added, and what is added sees
    something, which keeps it finite.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # slow to import

    queries, keys = q.shape[-2], k.shape[-2]
    window = spec.within(queries)
    q = lengthen(q * q.shape[-1] ** -0.5, 3, LANES)
    k, v = (lengthen(a, 2, LANES) for a in (k, v))
    shape = q.shape[-2], k.shape[-2]
    if spec.query is None:
        mask, segments = library.FullMask(shape), ()
        if keys % LANES:  # added keys get a segment of their own; every query stays in that of the real keys
            of_keys = jnp.broadcast_to(jnp.arange(shape[1]) < keys, (len(k), shape[1]))
            segments = jnp.ones((len(q), shape[0]), jnp.int32), of_keys.astype(jnp.int32)
    else:
        mask = library.CausalMask(shape) if window is None else library.LocalMask(shape, (window - 1, 0), 0)
        segments = (lengthen(spec.query.segments, 1, LANES),) * 2  # what is added joins the padding

    def kernel(q, k, v, *segments):
        heads = q.shape[1] * q.shape[2]
        run = library.make_splash_mha(
            library.MultiHeadMask([mask] * heads),
            block_sizes=blocks(library, *shape),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        # Query head i of all reads key head i // group, which is how the heads of q lie.
        one = lambda q, k, v, *ids: run(q, k, v, library.SegmentIds(*ids) if ids else None)
        y = jax.vmap(one)(q.reshape(len(q), heads, *q.shape[3:]), k, v, *segments)
        return y.reshape(q.shape)

    y = on_each_device(kernel, axis_of_heads(spec), q, k, v, *segments)
    return y[..., :queries, :]


def blocks(library, queries: int, keys: int):
    """Pieces of the sequences as long as they may be: JAX's own 128 leave the matrix unit waiting."""
    of_q, of_k = (max(n for n in range(LANES, BLOCK + 1, LANES) if m % n == 0) for m in (queries, keys))
    return library.BlockSizes(
        block_q=of_q,
        block_kv=of_k,
        block_kv_compute=of_k,
        block_q_dkv=of_q,
        block_kv_dkv=of_k,
        block_kv_dkv_compute=of_k,
        block_q_dq=of_q,
        block_kv_dq=of_k,
    )


KERNELS["splash"] = Kernel(splash, beyond, platform="tpu")
