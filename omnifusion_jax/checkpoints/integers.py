"""Kernels of integers in a checkpoint: made of values, or made values again, a piece at a time.

Beside a `kernel` of integers stands its `kernel_scale`, beside `embed` or `head` its `embed_scale` or
`head_scale`; nn/quantized.py says what they are. Integers that others have made may have a `kernel_zero` too,
of the shape of the scales, and a `kernel_order` [*ins]: which input stands at each place of the kernel.
"""

import functools
import threading
from collections.abc import Callable, Mapping

import jax
import numpy as np

from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, host
from omnifusion_jax.config import ModelConfig, check, part_of
from omnifusion_jax.models import lora
from omnifusion_jax.nn import quantized


def kind(arrays: Mapping) -> str | None:
    """int8 or int4: what the kernels of parameters by path are kept in; None: they are values."""
    kernels = (arrays.get(lora.kernel_of(path)) for path in arrays if lora.of_integers(path))
    return next((quantized.KINDS.get(np.dtype(a.dtype)) for a in kernels if a is not None), None)


def shapes(arrays: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of parameters by path, with those of values in place of integers and what is beside them."""
    found = {path: tuple(a.shape) for path, a in arrays.items() if not lora.of_integers(path)}
    for path in filter(lora.of_integers, arrays):
        kernel, shape = lora.kernel_of(path), tuple(arrays[path].shape)
        codes, scales = arrays.get(kernel), arrays.get(f"{kernel}_scale")
        if codes is not None and scales is not None and quantized.belong(codes, scales):
            whole = quantized.values_shape(codes, scales)
            if shape == (whole[: len(shape)] if path.endswith("_order") else tuple(scales.shape)):
                found[kernel] = whole
                continue
        found[path] = shape  # nothing that a model has
    return found


def typed(arrays: Mapping[str, Lazy], dtype) -> dict[str, Lazy]:
    """The parameters in another type (None: as they are). Integers and their scales keep theirs."""
    keep = paths(arrays)
    return {path: a if dtype is None or path in keep else a.astype(dtype) for path, a in arrays.items()}


def paths(arrays: Mapping) -> set[str]:
    """The paths of integers and of what stands beside them."""
    return {name for path in filter(lora.of_integers, arrays) for name in (path, lora.kernel_of(path))}


def values_dtype(arrays: Mapping) -> np.dtype:
    """The dtype of what is values in the decoder: of the embeddings, or of norms if those are integers."""
    kept = paths(arrays)
    return next(arrays[p].dtype for p in sorted(arrays) if part_of(p) == "decoder" and p not in kept)


def quantised(
    config: ModelConfig, arrays: Mapping[str, Lazy], kind: str, whole: bool = False
) -> dict[str, Lazy]:
    """The parameters with the kernels of the decoder's layers as integers of the kind int8 or int4.

    Scales come right after their integers: of a kernel that is read in this order, each piece is read once.

    Args:
      whole: all inputs of an output share a scale, and the embeddings and the head are integers too, with a
        scale for each token; else blocks of inputs share one.
    Raises: ConfigError when a kernel cannot be kept so.
    """
    shapes = lora.scales_shapes(config, whole)
    blocks = {path: shape for path, shape in shapes.items() if path in arrays}
    check(bool(blocks), f"weights={kind}: the decoder has no kernel that can be kept as integers")
    one_at_a_time = threading.Lock()  # what one thread makes, the others wait for and share

    @functools.lru_cache(maxsize=3)  # as many as are joined
    def made(path, bounds):  # bounds: (start, stop) along each dimension of the scales
        spans, kernel = [slice(*pair) for pair in bounds], arrays[path]
        block = kernel.read(widened(spans, kernel.shape, blocks[path]))
        return on_host(quantized.quantise, tuple(s.stop - s.start for s in spans), kind)(block)

    found = {}
    for path, kernel in arrays.items():
        if path not in blocks:
            found[path] = kernel
            continue
        size = kernel.shape[quantized.axis_of(kernel.shape, blocks[path])]
        check(size % 4 == 0 or whole, f"weights={kind}: {path} has {size} inputs, no multiple of 4")

        def make(spans, path=path):
            with one_at_a_time:
                return made(path, tuple((s.start, s.stop) for s in spans))

        outline = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
        pair = jax.eval_shape(lambda a, path=path: quantized.quantise(a, blocks[path], kind), outline)
        for i, name in enumerate((path, f"{path}_scale")):
            part = lambda spans, make=make, i=i: make(spans)[i]
            found[name] = in_whole_blocks(pair[i], blocks[path], part, kernel.origin)
    return found


def plain(arrays: Mapping[str, Lazy], dtype=None) -> dict[str, Lazy]:
    """The parameters with values in place of integers, of `dtype` (None: `values_dtype`)."""
    found = {path: a for path, a in arrays.items() if not lora.of_integers(path)}
    for path in [path for path in arrays if lora.of_integers(path) and path.endswith("_scale")]:
        kernel = lora.kernel_of(path)
        codes, scales, zeros = arrays[kernel], arrays[path], arrays.get(f"{kernel}_zero")

        def values(spans, codes=codes, scales=scales, zeros=zeros):
            block = codes.read(widened(spans, codes.shape, scales.shape))
            beside = [a.read(spans) for a in (scales, zeros) if a is not None]
            return on_host(quantized.values)(block, *beside)

        outline = jax.ShapeDtypeStruct(quantized.values_shape(codes, scales), np.float32)
        a = in_whole_blocks(outline, scales.shape, values, codes.origin)
        if f"{kernel}_order" in arrays:
            a = in_first_order(a, arrays[f"{kernel}_order"])
        found[kernel] = a.astype(dtype or values_dtype(arrays))
    return found


def in_first_order(a: Lazy, order: Lazy) -> Lazy:
    """A stack of kernels whose inputs stand in `order` [layers, *ins], with its inputs in their own order."""
    ins = tuple(slice(0, n) for n in order.shape[1:])

    def read(spans):
        layers, outs = spans[0], spans[order.ndim :]
        kernels, places = a.read((layers, *ins, *outs)), order.read((layers, *ins))
        found = np.empty_like(kernels)
        for kernel, place, one in zip(kernels, places, found, strict=True):
            one.reshape(place.size, -1)[place.reshape(-1)] = kernel.reshape(place.size, -1)
        return found[(slice(None), *spans[1 : order.ndim])]

    return Lazy(a.shape, a.dtype, read, a.origin)


def in_whole_blocks(outline, blocks: tuple[int, ...], make: Callable, origin: str) -> Lazy:
    """A Lazy of the shape and dtype of `outline`, made of pieces that cut no block.

    `blocks` is the shape of the scales; `make(spans)` gives what belongs to a part of them.
    """
    units = [size // count for size, count in zip(outline.shape, blocks, strict=True)]

    def read(spans):
        pairs = list(zip(spans, units, strict=True))
        piece = make(tuple(slice(s.start // unit, -(-s.stop // unit)) for s, unit in pairs))
        starts = [s.start // unit * unit for s, unit in pairs]
        return piece[tuple(slice(s.start - n, s.stop - n) for s, n in zip(spans, starts, strict=True))]

    return Lazy(outline.shape, outline.dtype, read, origin)


def widened(spans, shape, blocks):
    """The spans of an array that belong to those of its scales."""
    units = [size // count for size, count in zip(shape, blocks, strict=True)]
    return tuple(slice(s.start * unit, s.stop * unit) for s, unit in zip(spans, units, strict=True))


def on_host(work: Callable, *settings) -> Callable:
    """`work(*arrays, *settings)` computed by the CPU, so that integers are the same on every machine."""

    def run(*arrays):
        with jax.default_device(host()):
            found = compiled(work, settings)(*map(np.asarray, arrays))
        return jax.tree.map(np.asarray, found)

    return run


@functools.cache
def compiled(work, settings):
    return jax.jit(lambda *arrays: work(*arrays, *settings))
