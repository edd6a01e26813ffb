"""Parameters on huge pages."""

import gc
import mmap
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from omnifusion_jax.checkpoints.storage import pages
from omnifusion_jax.checkpoints.storage.lazy_array import lazy
from omnifusion_jax.checkpoints.storage.placement import for_answers

pytestmark = pytest.mark.skipif(not pages.AVAILABLE, reason="this system has no huge pages to ask for")
SHAPES = {"a": (3,), "b": (700, 1001), "c": (1,), "d": (0, 4), "e": (1025, 5)}
TYPES = {"a": ml_dtypes.bfloat16, "c": np.float32, "e": np.int8}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    draw = lambda path: np.asarray(rng.normal(size=SHAPES[path]) * 50).astype(TYPES.get(path, np.float32))
    return {path: draw(path) for path in SHAPES}


def flags_of(a) -> list[str]:
    """What the kernel notes of the stretch of memory that an array begins in."""
    for text in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", text)
        if span and int(span[1], 16) <= a.unsafe_buffer_pointer() < int(span[2], 16):
            return re.search(r"VmFlags: (.*)", text)[1].split()
    raise AssertionError("the array lies nowhere")


def test_they_lie_there_as_they_were_read(arrays):
    found = for_answers({path: lazy(a) for path, a in arrays.items()})
    gc.collect()  # nothing but the arrays holds the memory
    assert list(found) == list(arrays)
    for path, a in arrays.items():
        assert isinstance(found[path], jax.Array) and found[path].dtype == a.dtype
        assert_array_equal(np.asarray(found[path]), a, err_msg=path)
    assert "hg" in flags_of(found["b"]) and "hg" in flags_of(found["e"])
    first = found["a"].unsafe_buffer_pointer()
    assert first % pages.HUGE == 0
    assert 0 < found["e"].unsafe_buffer_pointer() - first < sum(a.nbytes for a in arrays.values())
    assert for_answers({}) == {}


def test_a_kernel_without_them_gives_others(arrays, monkeypatch):
    class Refusing(mmap.mmap):
        def madvise(self, option):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    found = for_answers({path: lazy(a) for path, a in arrays.items()})
    assert "hg" not in flags_of(found["b"])
    for path, a in arrays.items():
        assert_array_equal(np.asarray(found[path]), a, err_msg=path)
