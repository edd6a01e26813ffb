"""Arrays of a file spread over a mesh: a process reads only what its own devices hold."""

from collections.abc import Mapping

import jax
import numpy as np

from omnifusion_jax.models.axes import placements


def placed(mesh: jax.sharding.Mesh, arrays: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Parameters by path, spread over `mesh` as models/axes.py says.

    A process reads only what its own devices hold.
    """
    return {path: place(arrays[path], sharding) for path, sharding in placements(mesh, arrays).items()}


def place(a, sharding: jax.sharding.Sharding) -> jax.Array:
    """One array as a jax array. A block that several devices hold is read once."""
    read = {}

    def shard(index):
        key = tuple((i.start, i.stop) for i in index)
        if key not in read:
            read[key] = np.asarray(a[index])
        return read[key]

    return jax.make_array_from_callback(a.shape, sharding, shard)
