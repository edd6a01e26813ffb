"""Arrays that are read a piece at a time, when they are used, so that a model may be larger than memory."""

import concurrent.futures
import functools
import itertools
import math
import mmap
from collections.abc import Callable, Sequence

import jax
import numpy as np

WORKERS = 4  # pieces in flight: some copy while others wait for the disk


class Lazy:
    """An array with a shape and a dtype, whose values are read only when they are asked for.

    `a[index]` reads that part and gives a numpy array. The index may hold integers, slices without a step,
    and `...`. `np.asarray(a)` and `jnp.asarray(a)` read everything.
    """

    def __init__(self, shape, dtype, read: Callable[[tuple[slice, ...]], np.ndarray], origin: str = ""):
        """An array of `shape` and `dtype` whose values `read` reads.

        `read` is called with one slice(start, stop) per dimension, each within `shape`, and returns that
        block as a numpy array of `dtype`. `origin` is the array's name in the file that it comes from.
        """
        self.shape, self.dtype, self.read, self.origin = tuple(shape), np.dtype(dtype), read, origin

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        index = list(index) if isinstance(index, tuple) else [index]
        rest = self.ndim - sum(i is not Ellipsis for i in index)
        at = next((n for n, i in enumerate(index) if i is Ellipsis), len(index))
        index[at : at + 1] = [slice(None)] * rest
        spans = [span(i, n) for i, n in zip(index, self.shape, strict=True)]
        block = self.read(tuple(spans))
        return block[tuple(slice(None) if isinstance(i, slice) else 0 for i in index)]

    def __array__(self, dtype=None, copy=None):
        return self[...].astype(dtype or self.dtype, copy=bool(copy))

    def astype(self, dtype):
        """The same array in another type, converted piece by piece."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype:
            return self
        return Lazy(self.shape, dtype, lambda spans: self.read(spans).astype(dtype), self.origin)

    def row(self, i: int):
        """What stands at index `i` of the first dimension, read when it is used."""
        return Lazy(
            self.shape[1:], self.dtype, lambda spans: self.read((slice(i, i + 1), *spans))[0], self.origin
        )


def span(index, n):
    """An index into a dimension of length `n` as slice(start, stop). The index may count from the end."""
    if isinstance(index, slice):
        start, stop, step = index.indices(n)
        assert step == 1, f"{index}: a lazy array has no steps"
        return slice(start, max(start, stop))
    start = range(n)[index]  # raises IndexError
    return slice(start, start + 1)


def lazy(a) -> Lazy:
    """Any array as a Lazy one."""
    return a if isinstance(a, Lazy) else Lazy(a.shape, a.dtype, lambda spans: np.asarray(a[spans]))


def side_by_side(parts: Sequence[Lazy], axis: int) -> Lazy:
    """Arrays of one dtype one after the other along a dimension, as one."""
    starts = [0, *itertools.accumulate(part.shape[axis] for part in parts)]
    shape = list(parts[0].shape)
    shape[axis] = starts[-1]

    def read(spans):
        pieces, spans = [], list(spans)
        whole = spans[axis]
        for part, first in zip(parts, starts[:-1], strict=True):
            here = whole.start - first, whole.stop - first
            spans[axis] = slice(*np.clip(here, 0, part.shape[axis]).tolist())
            pieces.append(part.read(tuple(spans)))
        return np.concatenate(pieces, axis)

    return Lazy(shape, parts[0].dtype, read, " ".join(part.origin for part in parts))


def with_axis(a: Lazy, axis: int) -> Lazy:
    """The array with a dimension of 1 more, which comes to be the one at `axis`, counted from the end."""
    shape = np.expand_dims(np.broadcast_to(np.uint8(0), a.shape), axis).shape

    def read(spans):
        others = list(spans)
        here = others.pop(axis)
        return np.take(np.expand_dims(a.read(tuple(others)), axis), range(here.start, here.stop), axis)

    return Lazy(shape, a.dtype, read, a.origin)


def zeros(shape, dtype) -> Lazy:
    return Lazy(shape, dtype, lambda spans: np.zeros([s.stop - s.start for s in spans], dtype))


@functools.cache
def host():
    """The CPU as a JAX device, or None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def in_order(view: np.ndarray) -> np.ndarray:
    """A copy of a permuted view, in C order.

    XLA transposes two-byte numbers ten times as fast as numpy, so the copy goes through the CPU as a JAX
    device where it can. Numbers of eight bytes cannot: JAX would make float32 of float64.
    """
    if view.flags.c_contiguous or view.dtype.itemsize > 4 or host() is None:
        return np.array(view, order="C")
    with jax.ensure_compile_time_eval():  # the array may be read as a constant while a function is traced
        return np.asarray(jax.device_put(view, host()))


def forget(a: np.ndarray):
    """Gives the memory-mapped pages under `a` back, which otherwise count as this process's memory.

    They are read again when they are used again.
    """
    start, stop = np.lib.array_utils.byte_bounds(a)
    while isinstance(a, np.ndarray):
        a = a.base
    if isinstance(a, mmap.mmap):
        origin = np.frombuffer(a, np.uint8).ctypes.data
        first = (start - origin) // mmap.PAGESIZE * mmap.PAGESIZE
        a.madvise(mmap.MADV_DONTNEED, first, stop - origin - first)


def in_parallel(work, items):
    """Calls `work(item)` for every item, a few at a time.

    The first error is raised, and calls that have not begun by then are cancelled.
    """
    pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
    try:
        for _ in pool.map(work, items):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
