"""A short description of what in a model determines its answers.

It is equal for equal models, however their parameters are spread over devices.
"""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp

from omnifusion_jax.nn import nnx

UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by size in bytes


def fingerprint(model) -> dict:
    """The fingerprint of an inference.model.Model, which JSON can hold.

    {"weights": hash, "tokenizer": hash, "dtype": its name, "config": every field}
    """
    sums = jax.device_get({path: checksum(a) for path, a in nnx.parameters(model.module).items()})
    weights = {path: [int(sums[path])] for path in sorted(sums)}
    return {
        "weights": digest(weights),
        "tokenizer": model.tokenizer.digest,
        "dtype": model.dtype,
        "config": dataclasses.asdict(model.config),
    }


def digest(value):
    """A short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def checksum(a):
    """The sum uint32[] of every element's bits, scrambled together with its index.

    The sum of integers does not depend on their order, and hence not on the mesh.
    """
    bits = jax.lax.bitcast_convert_type(a, UNSIGNED[a.dtype.itemsize]).astype(jnp.uint32)
    place = jnp.zeros(a.shape, jnp.uint32)
    for axis, size in enumerate(a.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
    return jnp.sum(scramble(bits ^ scramble(place)), dtype=jnp.uint32)


def scramble(x):
    """MurmurHash3's finaliser, a permutation of 32-bit numbers; each bit affects half of the others."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
