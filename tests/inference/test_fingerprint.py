"""A model's fingerprint: the same for the same numbers, wherever they lie; another for any other bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifusion_jax import sharding
from omnifusion_jax.inference.fingerprint import checksum

MASK = 2**32 - 1


def by_hand(a):
    """The same sum in Python's own integers."""

    def scramble(x):
        x = (x ^ x >> 16) * 0x85EBCA6B & MASK
        x = (x ^ x >> 13) * 0xC2B2AE35 & MASK
        return x ^ x >> 16

    bits = np.frombuffer(a.tobytes(), f"<u{a.dtype.itemsize}").tolist()
    return sum(scramble(b ^ scramble(i)) for i, b in enumerate(bits)) & MASK


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_the_sum_is_what_it_says(shape, dtype):
    a = np.asarray(jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype))
    assert int(checksum(a)) == by_hand(a)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 63), st.integers(0, 63), st.integers(0, 31))
def test_a_bit_or_a_place_more_or_less_changes_it(seed, i, j, bit):
    a = np.asarray(jnp.asarray(np.random.default_rng(seed).normal(size=64), jnp.bfloat16)).astype(
        np.float32
    )  # half of its bits are 0
    flipped, swapped = a.copy(), a.copy()
    flipped.view(np.uint32)[i] ^= np.uint32(1 << bit)
    swapped[[i, j]] = swapped[[j, i]]
    assert checksum(flipped) != checksum(a)
    assert (checksum(swapped) == checksum(a)) == (a[i] == a[j])


def test_a_mesh_changes_nothing():
    """Rows and columns on eight devices, more than one of them apart."""
    a = np.random.default_rng(0).normal(size=(16, 6, 8)).astype(np.float32)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for spec in ((("data", "fsdp"), None, "tensor"), (None, "tensor", ("fsdp", "data"))):
        spread = jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
        assert int(checksum(spread)) == by_hand(a)
