"""Arrays of a file spread over a mesh: a process reads only what its own devices hold."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.models.answering import apart
from omnifusion_jax.models.axes import placements


def placed(mesh: jax.sharding.Mesh, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Parameters by path, spread over `mesh` as models/axes.py says.

    A process reads only what its own devices hold.
    """
    return {path: place(arrays[path], sharding) for path, sharding in placements(mesh, arrays).items()}


def for_answers(arrays: Mapping[str, Lazy], mesh: jax.sharding.Mesh | None = None) -> dict[str, jax.Array]:
    """Parameters by path on their devices, with the decoder's layers apart: what `inference.Model` takes.

    They are read one after the other, so that the host never holds more than a few of them.
    """
    arrays = dict(sorted(apart(arrays, Lazy.row).items()))  # layer by layer, scales after their integers
    if mesh:
        return placed(mesh, arrays)
    return {path: jnp.asarray(a) for path, a in arrays.items()}


def place(a, sharding: jax.sharding.Sharding) -> jax.Array:
    """One array as a jax array. A block that several devices hold is read once."""
    if sharding.is_fully_addressable:
        return jax.device_put(np.asarray(a), sharding)
    read = {}

    def shard(index):
        key = tuple((i.start, i.stop) for i in index)
        if key not in read:
            read[key] = np.asarray(a[index])
        return read[key]

    return jax.make_array_from_callback(a.shape, sharding, shard)
