"""Parameters on huge pages of memory, for models that answer on a CPU.

Each token reads every weight. On pages of 4 kB, a tenth of the time of an answer that is alone goes into
looking up where they are (docs/performance.md).
"""

import contextlib
import itertools
import mmap
from collections.abc import Mapping

import jax
import numpy as np

HUGE = 2**21  # bytes of a huge page
LINE = 64  # bytes: an array that begins at a multiple of them becomes one of JAX as it lies
AVAILABLE = hasattr(mmap, "MADV_HUGEPAGE")  # on Linux


def on_huge_pages(arrays: Mapping) -> dict[str, jax.Array]:
    """Arrays by path, read one after the other into one stretch of memory, of which none is given back alone.

    They are arrays of the default device, a CPU. A kernel without huge pages gives others.
    """
    sizes = [-(-a.nbytes // LINE) * LINE for a in arrays.values()]
    memory = mmap.mmap(-1, sum(sizes) + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    first = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE
    starts = itertools.accumulate(sizes, initial=first)  # and the end
    return {path: at(memory, start, a) for (path, a), start in zip(arrays.items(), starts, strict=False)}


def at(memory: mmap.mmap, start: int, a) -> jax.Array:
    """The values of `a` as they will lie in memory, from byte `start` on."""
    values = np.ndarray(a.shape, a.dtype, memory, start)
    values[...] = np.asarray(a)
    return jax.device_put(values)
