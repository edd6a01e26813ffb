"""Arrays that are read when they are used."""

import re
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnifusion_jax.checkpoints.mapping import tensors
from omnifusion_jax.checkpoints.mapping.transforms import SAME
from omnifusion_jax.checkpoints.storage import lazy_array
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, forget, in_order, in_parallel, lazy
from omnifusion_jax.checkpoints.storage.placement import place, placed
from omnifusion_jax.models.axes import placements
from omnifusion_jax.sharding import make_mesh

BF16 = np.dtype(ml_dtypes.bfloat16)


class Counted:
    """A Lazy array over a numpy one, and how many of its elements were read."""

    def __init__(self, a):
        self.elements = 0

        def read(spans):
            assert all(
                0 <= s.start <= s.stop <= n and s.step is None for s, n in zip(spans, a.shape, strict=True)
            )
            self.elements += a[spans].size
            return a[spans].copy()

        self.array = Lazy(a.shape, a.dtype, read)


@st.composite
def indexed(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    one = [
        st.integers(-n, n - 1) | st.builds(slice, *[st.none() | st.integers(-n - 1, n + 1)] * 2)
        for n in shape
    ]
    index = [draw(s) for s in one[: draw(st.integers(0, len(shape)))]]
    if draw(st.booleans()):
        index.insert(draw(st.integers(0, len(index))), Ellipsis)
        tail = len(index) - 1 - index.index(Ellipsis)
        index[len(index) - tail :] = [draw(s) for s in one[len(one) - tail :]]
    return shape, tuple(index)


@given(indexed())
def test_an_index_reads_what_numpy_gives_and_no_more(case):
    shape, index = case
    a = np.arange(np.prod(shape)).reshape(shape)
    counted = Counted(a)
    np.testing.assert_array_equal(counted.array[index], a[index], strict=True)
    assert counted.elements == a[index].size


def test_it_converts_like_an_array():
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = Counted(a).array
    assert (found.shape, found.dtype, found.ndim, found.size, found.nbytes, len(found)) == (
        (3, 4),
        np.float32,
        2,
        12,
        48,
        3,
    )
    np.testing.assert_array_equal(jnp.asarray(found), a)
    np.testing.assert_array_equal(list(found), list(a))
    assert np.asarray(found, np.float64).dtype == np.float64
    with pytest.raises(IndexError):
        found[3]
    kept = lazy(a)
    np.array(kept)[:] = 0  # a copy is one's own
    np.testing.assert_array_equal(np.asarray(kept), a)


def test_another_type_is_made_of_the_piece_alone():
    counted = Counted(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4))
    half = counted.array.astype("bfloat16")
    assert half.dtype == BF16 and counted.elements == 0
    np.testing.assert_array_equal(
        half[1], np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)[1].astype(BF16)
    )
    assert counted.elements == 4 and half.astype(BF16) is half


@pytest.mark.parametrize("kind", [np.uint16, BF16, np.float16, np.float32, np.float64])
def test_order_changes_no_bit(kind):
    bits = np.random.default_rng(0).integers(
        0, 256, (6, 8, 4 * np.dtype(kind).itemsize), np.uint8
    )  # NaNs and denormal numbers among them
    a = bits.view(kind)
    for view in (a, a.T, a.transpose(1, 0, 2)[:, 2:5], a[0, 0, :0], a[0, 0, 0]):
        found = in_order(view)
        assert found.flags.c_contiguous and found.shape == view.shape and found.dtype == kind
        assert found.tobytes() == view.tobytes() and not np.shares_memory(found, a)


def test_a_constant_can_be_read_while_a_function_is_traced():
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    transposed = Lazy((3, 2), np.float32, lambda spans: in_order(a.T[spans]))
    np.testing.assert_array_equal(jax.jit(lambda x: x + jnp.asarray(transposed))(1), a.T + 1)


def resident(file):
    """Bytes of a mapped file that count as this process's memory."""
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if str(file) in block:
            return int(re.search(r"Rss: +(\d+)", block)[1]) * 1024
    raise AssertionError(f"{file} is not mapped")


def test_pages_are_given_back(tmp_path):
    expected = np.random.default_rng(0).integers(0, 256, (64, 65536), np.uint8)
    expected.tofile(tmp_path / "file")
    mapped = np.asarray(np.memmap(tmp_path / "file", np.uint8, "r"))[100:-100].view()
    assert mapped.sum(dtype=np.int64) > 0 and resident(tmp_path / "file") > 4e6
    forget(mapped[1 << 20 : 3 << 20])
    assert resident(tmp_path / "file") < 2.2e6
    forget(mapped)
    assert resident(tmp_path / "file") == 0
    np.testing.assert_array_equal(mapped, expected.reshape(-1)[100:-100])
    forget(expected)  # nothing to do for memory of its own


def test_only_pages_under_a_share_are_touched(tmp_path, monkeypatch):
    """Of a foreign file that is mostly a hole: 256 MB for the embeddings of which 1 MB is asked for."""
    vocab, embed = 65536, 2048
    file = tmp_path / "embed"
    with open(file, "wb") as hole:
        hole.truncate(vocab * embed * 2)
    stored = {"model.embed_tokens.weight": np.memmap(file, np.float16, "r", shape=(vocab, embed))}
    table = {"model.embed_tokens.weight": ("decoder/embed", SAME)}
    monkeypatch.setattr(tensors, "forget", lambda a: None)
    found = tensors.from_foreign(stored, table, {"decoder/embed": (vocab, embed)}, "here")["decoder/embed"]
    assert found[256:512].shape == (256, 2048)
    assert resident(file) < 2e6
    monkeypatch.undo()
    assert found[256:512].any() == resident(file) == 0


def test_an_error_stops_what_has_not_begun():
    begun, at_once, most, lock = [], 0, 0, threading.Lock()

    def work(n):
        nonlocal at_once, most
        with lock:
            begun.append(n)
            at_once += 1
            most = max(most, at_once)
        try:
            if n == 5:
                raise OSError("full")
            threading.Event().wait(0.01)
        finally:
            with lock:
                at_once -= 1

    in_parallel(work, range(5))
    assert sorted(begun) == [*range(5)]
    with pytest.raises(OSError, match="full"):
        in_parallel(work, range(1000))
    assert len(begun) < 100 and most <= lazy_array.WORKERS


def test_a_mesh_gets_every_share_read_once():
    mesh = make_mesh(data=2, fsdp=4)
    a = np.arange(8 * 6, dtype=np.float32).reshape(8, 6)
    for spec in (jax.P("fsdp"), jax.P(None), jax.P(("data", "fsdp")), jax.P("fsdp", "data")):
        counted = Counted(a)
        found = place(counted.array, jax.NamedSharding(mesh, spec))
        np.testing.assert_array_equal(found, a)
        assert found.sharding.spec == spec and counted.elements == a.size
    share = Counted(a)  # of one device of eight
    index = jax.NamedSharding(mesh, jax.P("fsdp", "data")).devices_indices_map(a.shape)[jax.devices()[5]]
    assert share.array[index].size == share.elements == a.size // 8


def test_parameters_go_where_the_table_says():
    mesh = make_mesh(fsdp=4, tensor=2)
    arrays = {"decoder/embed": np.ones((6, 8), np.float32), "decoder/norm/scale": np.ones(8, np.float32)}
    found = placed(mesh, {path: lazy(a) for path, a in arrays.items()})
    assert {path: a.sharding for path, a in found.items()} == placements(mesh, arrays)
