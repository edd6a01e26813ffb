"""Orbax's format, written and read a chunk at a time.

An array is a directory of zarr chunks. The chunks written here are uncompressed, hold at most CHUNK_BYTES,
and are contiguous runs of the array in C order, so a layer is written and read without its neighbours.
"""

import functools
import itertools
import math
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, in_parallel, lazy
from omnifusion_jax.paths import remote

CHUNK_BYTES = 16 << 20

# A chunk written by another program may span a whole array. This cache keeps such a chunk,
# which would otherwise be decoded again for every layer.
LONG_CHUNKS = tensorstore.Context({"cache_pool": {"total_bytes_limit": 4 << 30}})


def chunk_shape(shape, itemsize):
    """The shape of the longest run in C order that fits in CHUNK_BYTES.

    The dimension that it cuts is divided evenly, because zarr pads the last chunk on disk.
    """
    chunk, held = list(shape), itemsize
    for axis in reversed(range(len(shape))):
        pieces = max(1, math.ceil(shape[axis] / max(1, CHUNK_BYTES // held)))
        chunk[axis] = max(1, math.ceil(shape[axis] / pieces))
        held *= chunk[axis]
        if pieces > 1:
            return [1] * axis + chunk[axis:]
    return chunk


def chunks(shape, chunk):
    """The index of every chunk, as a tuple of slices."""
    spans = (
        [slice(start, min(start + step, n)) for start in range(0, n, step)]
        for n, step in zip(shape, chunk, strict=True)
    )
    return itertools.product(*spans)


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Tells Orbax how to save a Lazy array. What is saved restores like any other array."""

    async def serialize(self, values, infos, args=None):
        if jax.process_index() != 0:
            return []
        pieces = []
        for a, info in zip(values, infos, strict=True):
            chunk = chunk_shape(a.shape, a.dtype.itemsize)
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(info.parent_dir / info.name)},
                "metadata": {"shape": a.shape, "chunks": chunk, "compressor": None},
                # Otherwise a chunk of zeros is left out, and Orbax calls it missing.
                "store_data_equal_to_fill_value": True,
            }
            store = await tensorstore.open(spec, dtype=tensorstore.dtype(a.dtype), create=True)
            pieces += [(a, store, index) for index in chunks(a.shape, chunk)]

        def write(piece):
            a, store, index = piece
            store[index].write(a[index]).result()

        in_parallel(write, pieces)
        return []


def save(directory: Path, tree):
    """Writes a nested dict of Lazy, numpy or jax arrays so that `ocp.StandardCheckpointer` can read it.

    Only a few chunks are in memory at a time.
    """
    # Every array of the tree is Lazy by then, but Orbax warns where it finds no handler for jax.Array.
    known = ((Lazy, LazyHandler()), (jax.Array, ocp.type_handlers.ArrayHandler()))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=ocp.type_handlers.create_type_handler_registry(*known)
    )
    # Orbax's own `finalize` would merge what each process wrote, and warn that there is nothing to merge.
    handler.finalize = lambda directory: None
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, jax.tree.map(lazy, tree))


def stored(directory: Path, name: str, shape, dtype) -> Lazy:
    """A Lazy array over the one that Orbax saved as `name` (for example "decoder.layers.up").

    Indexing it reads only the chunks that hold the values asked for.
    """
    base = {"driver": "file", "path": f"{directory}/"}
    if remote(directory):
        base = tensorstore.KvStore.Spec(f"{directory}/").to_json()
    if ocp.type_handlers.is_ocdbt_checkpoint(epath.Path(directory)):
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        kvstore = {**base, "path": f"{base['path']}{name}/"}
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}

    @functools.cache
    def store():
        found = tensorstore.open(spec).result()
        chunk_bytes = math.prod(found.chunk_layout.read_chunk.shape) * found.dtype.numpy_dtype.itemsize
        if chunk_bytes > CHUNK_BYTES:
            return tensorstore.open(spec, context=LONG_CHUNKS).result()
        return found

    return Lazy(shape, dtype, lambda spans: store()[spans].read().result())
