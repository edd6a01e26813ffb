"""A few queries and the keys of a cache on a CPU, in C++, where that can be compiled. See `nn/loops.py`."""

from omnifusion_jax.nn import loops
from omnifusion_jax.nn.choice import Kernel
from omnifusion_jax.nn.kernels.fused import first
from omnifusion_jax.tables import KERNELS

STEP = 16  # head_dim is a multiple of it: numbers of the widest register


def run(q, k, v, spec, dropout):
    """See `attend.attend`."""
    return loops.attention(q, k, v, spec.mask())


def refuses(need):
    """What of a Need this kernel cannot do."""
    reason = first(
        {
            "a sequence that attends to itself": not need.cache,
            "queries that see everything": need.hidden == "nothing",
            f"{need.queries} queries": need.queries > loops.MOST,
            f"head_dim {need.head_dim}": need.head_dim % STEP,
            "dropout": need.dropout,
            need.dtype: need.dtype != "float32",
        }
    )
    return reason or loops.missing()  # last: it compiles


KERNELS["loops"] = Kernel(run, refuses, platform="cpu")
