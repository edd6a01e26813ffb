"""Orbax's format, written and read a chunk at a time.

An array is a directory of zarr chunks. Here they are not compressed, hold at most CHUNK_BYTES, and are runs of the array in C order, so that a layer
is written and read without its neighbours.
"""

import functools
import itertools
import math

import jax
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, in_parallel, lazy

CHUNK_BYTES = 16 << 20
LONG_CHUNKS = tensorstore.Context(
    {"cache_pool": {"total_bytes_limit": 4 << 30}}
)  # others' may span an array: kept, not decoded for every layer


def chunk_shape(shape, itemsize):
    """The longest run in C order within CHUNK_BYTES, evened out over the dimension it cuts: zarr pads the last chunk on disk."""
    chunk, held = list(shape), itemsize
    for axis in reversed(range(len(shape))):
        pieces = max(1, math.ceil(shape[axis] / max(1, CHUNK_BYTES // held)))
        chunk[axis] = max(1, math.ceil(shape[axis] / pieces))
        held *= chunk[axis]
        if pieces > 1:
            return [1] * axis + chunk[axis:]
    return chunk


def chunks(shape, chunk):
    """The index of every chunk, as slices."""
    return itertools.product(
        *(
            [slice(i, min(i + step, n)) for i in range(0, n, step)]
            for n, step in zip(shape, chunk, strict=True)
        )
    )


class LazyHandler(ocp.type_handlers.NumpyHandler):
    """Tells Orbax how a Lazy array is saved; whoever restores it finds an array like any other."""

    async def serialize(self, values, infos, args=None):
        if jax.process_index() == 0:
            pieces = []
            for a, info in zip(values, infos, strict=True):
                chunk = chunk_shape(a.shape, a.dtype.itemsize)
                spec = {
                    "driver": "zarr",
                    "kvstore": {"driver": "file", "path": str(info.parent_dir / info.name)},
                    "metadata": {"shape": a.shape, "chunks": chunk, "compressor": None},
                    "store_data_equal_to_fill_value": True,  # or a chunk of zeros is left out, which Orbax calls missing
                }
                store = await tensorstore.open(spec, dtype=tensorstore.dtype(a.dtype), create=True)
                pieces += [(a, store, index) for index in chunks(a.shape, chunk)]
            in_parallel(lambda piece: piece[1][piece[2]].write(piece[0][piece[2]]).result(), pieces)
        return []


def save(directory, tree):
    """Writes a nested dict of Lazy, numpy or jax arrays as `ocp.StandardCheckpointer` reads them, in little memory."""
    known = (
        (Lazy, LazyHandler()),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )  # Orbax warns where it misses the second
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=ocp.type_handlers.create_type_handler_registry(*known)
    )
    handler.finalize = lambda directory: (
        None
    )  # it would merge what each process wrote, and warn that there is nothing
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, jax.tree.map(lazy, tree))


def stored(directory, name, shape, dtype):
    """A Lazy array over the one that Orbax saved as `name` ("decoder.layers.up"). Only chunks that hold what is asked for are read."""
    base = {"driver": "file", "path": f"{directory}/"}
    ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(epath.Path(directory))
    kvstore = (
        {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        if ocdbt
        else {**base, "path": f"{directory}/{name}/"}
    )
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}

    @functools.cache
    def store():
        found = tensorstore.open(spec).result()
        long = math.prod(found.chunk_layout.read_chunk.shape) * found.dtype.numpy_dtype.itemsize > CHUNK_BYTES
        return tensorstore.open(spec, context=LONG_CHUNKS).result() if long else found

    return Lazy(shape, dtype, lambda spans: store()[spans].read().result())
