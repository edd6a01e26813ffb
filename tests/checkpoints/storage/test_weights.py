"""Files of tensors."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from omnifusion_jax.checkpoints.storage import weights
from omnifusion_jax.checkpoints.storage.weights import (
    open_tensors,
    read_safetensors,
    write_safetensors,
    write_weights,
)
from omnifusion_jax.errors import CheckpointError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(
        path,
        {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
            "b": np.ones((3,), ml_dtypes.bfloat16),
            "s": np.float16(2).reshape(()),
        },
    )
    return path


def test_safetensors_are_written_and_read_as_the_library_does(file, tmp_path):
    theirs, ours = safetensors.numpy.load_file(file), read_safetensors(file)
    assert theirs.keys() == ours.keys() and ours["b"].dtype == ml_dtypes.bfloat16
    for name in ours:
        np.testing.assert_array_equal(np.float32(ours[name]), np.float32(theirs[name]))
    safetensors.numpy.save_file(
        {"i": np.arange(5), "e": np.zeros((0, 3), np.float32)}, tmp_path / "other.safetensors"
    )
    other = read_safetensors(tmp_path / "other.safetensors")
    assert other["e"].shape == (0, 3) and list(other["i"]) == [0, 1, 2, 3, 4]
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_values_begin_at_a_multiple_of_eight_bytes(tmp_path):
    for n in range(1, 10):
        write_safetensors(tmp_path / "a.safetensors", {"a" * n: np.ones(2)})
        assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_what_the_system_writes_in_pieces_is_whole(tmp_path, monkeypatch):
    """One call of pwrite may take less than it was given: here 5 bytes at a time."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: whole(file, data[:5], offset))
    values = {"a": np.arange(7, dtype=np.float32), "b": np.arange(3, dtype=np.float64)}
    write_safetensors(tmp_path / "a.safetensors", values)
    theirs = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    for name, a in values.items():
        np.testing.assert_array_equal(theirs[name], a)


def test_no_damage_to_a_safetensors_file_goes_unnoticed(file):
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header = good[8 : 8 + length]
    variants = {
        "empty": b"",
        "short": good[:5],
        "cut": good[:-1],
        "longer": good + b"\0",
        "header length": (1 << 40).to_bytes(8, "little") + good[8:],
        "not json": good[:8] + b"?" * length + good[8 + length :],
        "offset": good.replace(b"[0, 24]", b"[0, 25]"),
        "negative": good.replace(b"[0, 24]", b"[-4, 2]"[:7]),
        "type": good.replace(b'"F32"', b'"F33"'),
        "shape": good.replace(b"[3, 2]", b"[3, 3]"),
        "three offsets": good.replace(b"[0, 24]", b"[0,1,2]"),
        "list": len(b"[]").to_bytes(8, "little") + b"[]",
    }
    assert header.startswith(b"{")
    for data in variants.values():
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: "):
            read_safetensors(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(CheckpointError, match="git-lfs pointer"):
        read_safetensors(file)


@pytest.mark.parametrize("second, size", [((8, 16), 16), ((12, 20), 20), ((4, 12), 12), ((0, 8), 8)])
def test_tensors_lie_side_by_side(tmp_path, second, size):
    """The second of two tensors of eight bytes: beside the first; after a gap; over its end; over all."""
    file = tmp_path / "model.safetensors"
    entries = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": place}
        for name, place in (("a", (0, 8)), ("b", second))
    }
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(size)))
    if second == (8, 16):
        assert read_safetensors(file)["b"].tobytes() == bytes(range(8, 16))
    else:
        with pytest.raises(CheckpointError, match=rf"b claims bytes {second[0]}\.\.{second[1]} of {size}"):
            read_safetensors(file)


def test_shards(tmp_path):
    write_safetensors(tmp_path / "1.safetensors", {"a": np.ones(2)})
    write_safetensors(tmp_path / "2.safetensors", {"b": np.ones(3)})
    index = tmp_path / "model.safetensors.index.json"

    def indexed(**names):
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        return open_tensors(tmp_path)

    assert indexed(a="1.safetensors", b="2.safetensors").keys() == {"a", "b"}
    for names, said in (
        ({"a": "1.safetensors", "b": "3.safetensors"}, "names 3.safetensors, which is missing"),
        ({"a": "1.safetensors", "c": "2.safetensors"}, "names tensors that no file holds: c"),
        ({"a": "../1.safetensors"}, "no weight_map"),
    ):
        with pytest.raises(CheckpointError, match=said):
            indexed(**names)
    write_safetensors(tmp_path / "2.safetensors", {"a": np.ones(3)})
    with pytest.raises(CheckpointError, match="a stands in another file too"):
        indexed(a="1.safetensors", b="2.safetensors")
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_tensors(tmp_path)


def test_weights_over_the_limit_are_several_files(tmp_path, monkeypatch):
    """Of 40 bytes: two of 20 fill the first to the last byte; the third alone is larger than a file."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 40)
    tensors = {
        "a": np.zeros(5, np.float32),
        "b": np.ones(5, np.float32),
        "c": np.full(25, 2, np.float16),
        "d": np.full(1, 3.0),
    }
    write_weights(tmp_path, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert index == {
        "metadata": {"total_size": 98},
        "weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": names[2]},
    }
    for name, a in tensors.items():
        np.testing.assert_array_equal(
            safetensors.numpy.load_file(tmp_path / index["weight_map"][name])[name], a
        )


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=r"no weights here; looked for model.safetensors.index.json"):
        open_tensors(tmp_path)
