"""Conversion in little memory: chunks, what is read, what interruption and a full disk leave."""

import errno
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from conftest import FAST_COMPILATION
from hypothesis import given
from hypothesis import strategies as st

from omnifusion_jax.checkpoints.checkpoint import Checkpoint
from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.load import load_checkpoint, load_encoder
from omnifusion_jax.checkpoints.mapping import tensors
from omnifusion_jax.checkpoints.mapping.tensors import to_foreign
from omnifusion_jax.checkpoints.mapping.transforms import SAME
from omnifusion_jax.checkpoints.native import is_native, open_native, save_native
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.checkpoints.storage import chunks, lazy_array, staging, weights
from omnifusion_jax.checkpoints.storage.placement import placed
from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.axes import placements
from omnifusion_jax.nested import flat, nested
from omnifusion_jax.sharding import make_mesh

C = tiny.config(layout="original")
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def arrays():
    return tiny.arrays(C, dtype=ml_dtypes.bfloat16) | {
        "special/eoi": np.zeros(C.decoder.width, ml_dtypes.bfloat16)
    }


@pytest.fixture
def original(arrays, tmp_path):
    """An original directory, written without PyTorch."""
    tiny.make_tokenizer(tmp_path / "tokenizer")
    export_original(
        Checkpoint(C, arrays, tmp_path / "tokenizer", "test"), tmp_path / "original", pickles=False
    )
    return tmp_path / "original"


@pytest.fixture
def small(monkeypatch):
    """Limits that make a tiny model a large one."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)


def same(found, expected):
    assert found.keys() == expected.keys()
    for path, a in expected.items():
        assert found[path].dtype == a.dtype
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(a), err_msg=path)


def content(directory):
    return {file.relative_to(directory): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@given(st.lists(st.integers(1, 50), max_size=4), st.sampled_from([1, 2, 4]))
def test_chunks_are_even_runs_in_c_order(shape, itemsize):
    limit = 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", limit)
        chunk = chunks.chunk_shape(shape, itemsize)
    indices = list(chunks.chunks(shape, chunk))
    assert math.prod(chunk) * itemsize <= limit
    cut = next((axis for axis in range(len(shape)) if chunk[axis] > 1), 0)
    assert all(c == 1 for c in chunk[:cut]) and chunk[cut + 1 :] == shape[cut + 1 :]
    seen = np.zeros(shape, int)
    for index in indices:
        seen[index] += 1
    assert (seen == 1).all()
    if chunk != [1] * len(shape):
        padding = -shape[cut] % chunk[cut] if shape else 0
        assert padding < max(1, math.ceil(shape[cut] / chunk[cut]))


def test_orbax_reads_what_is_streamed(tmp_path, arrays, small):
    save_native(tmp_path / "model", C, arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        same(flat(checkpointer.restore(tmp_path / "model/arrays"), "/"), arrays)
    same(open_native(tmp_path / "model")[1], arrays)
    assert max(file.stat().st_size for file in (tmp_path / "model/arrays").glob("*/[0-9]*")) <= 1000
    mesh = make_mesh(fsdp=4, tensor=2)
    same(placed(mesh, open_native(tmp_path / "model")[1]), arrays)


def test_what_jax_arrays_and_earlier_versions_wrote_is_read_by_layers(tmp_path, arrays):
    save_native(tmp_path / "model", C, {path: jax.numpy.asarray(a) for path, a in arrays.items()})
    same(open_native(tmp_path / "model")[1], arrays)
    old = tmp_path / "model/arrays"
    old.rename(tmp_path / "gone")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(old, nested(arrays, "/"))
    opened = open_native(tmp_path / "model", dtype="float32")[1]
    same(opened, {path: a.astype(np.float32) for path, a in arrays.items()})
    np.testing.assert_array_equal(
        opened["decoder/layers/feed_forward/up/kernel"][1, 2:5],
        arrays["decoder/layers/feed_forward/up/kernel"][1, 2:5].astype(np.float32),
    )


def test_a_part_is_read_alone(tmp_path, arrays):
    save_native(tmp_path / "model", C, arrays)
    opened = load_checkpoint(tmp_path / "model").arrays
    for chunk in (tmp_path / "model/arrays").glob("decoder.layers.*/[0-9]*"):
        chunk.unlink()
    same(
        load_encoder(tmp_path / "model")[1],
        {path: a for path, a in arrays.items() if path.startswith("image/encoders/")},
    )
    with pytest.raises(CheckpointError, match="model/arrays cannot be read"):
        np.asarray(opened["decoder/layers/feed_forward/up/kernel"])


def test_no_piece_is_larger_than_a_chunk(small, original, tmp_path, arrays, monkeypatch):
    copied, copy = [], tensors.in_order
    monkeypatch.setattr(tensors, "in_order", lambda view: copied.append(view.nbytes) or copy(view))
    found = load_checkpoint(original)
    assert not copied and all(isinstance(a, lazy_array.Lazy) for a in found.arrays.values())
    save_native(tmp_path / "native", found.config, found.arrays, found.tokenizer)
    assert max(copied) <= 1000 and sum(copied) == sum(a.nbytes for a in arrays.values())

    copied.clear()
    export_original(load_checkpoint(tmp_path / "native"), tmp_path / "back", pickles=False)
    largest = max(a[0].nbytes if "/layers/" in path else a.nbytes for path, a in arrays.items())
    assert max(copied) == largest and sum(copied) == sum(a.nbytes for a in arrays.values())
    assert content(tmp_path / "back") == content(original)


def test_weights_are_split_into_files_with_an_index(tmp_path, arrays, small):
    written = to_foreign(
        {path: a for path, a in arrays.items() if path.startswith("decoder/")},
        language_models.table(C.decoder),
    )
    weights.write_weights(tmp_path, written)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    assert all(
        shard.stat().st_size < 20_000 + 2000 or len(weights.read_safetensors(shard)) == 1 for shard in shards
    )
    same(weights.open_tensors(tmp_path), written)
    assert read_json(tmp_path / "model.safetensors.index.json")["metadata"]["total_size"] == sum(
        a.nbytes for a in written.values()
    )
    pytest.importorskip("torch")  # transformers has no models without it
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(
        transformers.MistralConfig(**language_models.decoder_json(C.decoder, "bfloat16")).to_json_string()
    )
    _, report = transformers.MistralForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_mesh_reads_a_foreign_directory_by_shares(original, arrays, monkeypatch):
    copied, copy = [], tensors.in_order
    monkeypatch.setattr(tensors, "in_order", lambda view: copied.append(view.size) or copy(view))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    found = load_checkpoint(original, mesh=mesh).arrays
    same(found, arrays)
    assert {path: a.sharding for path, a in found.items()} == placements(mesh, arrays)
    assert sum(copied) == sum(a.size for a in arrays.values())  # once, though each share is on two devices
    copied.clear()
    host = load_checkpoint(original).arrays
    for path, sharding in placements(mesh, arrays).items():  # what a process with one device reads
        index = sharding.devices_indices_map(arrays[path].shape)[jax.devices()[3]]
        before = sum(copied)
        np.testing.assert_array_equal(host[path][index], arrays[path][index])
        assert sum(copied) - before == arrays[path][index].size, path
    assert sum(copied) < 0.4 * sum(a.size for a in arrays.values())


KILLED = """
import os, signal, sys
from importlib import import_module
convert = import_module("omnifusion_jax.convert")
from omnifusion_jax.checkpoints.mapping import tensors
left, copy = int(sys.argv.pop()), tensors.in_order
def in_order(view):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return copy(view)
tensors.in_order = in_order
convert.command.run(convert.main)
"""


@pytest.mark.parametrize("to", [pytest.param("native", marks=pytest.mark.sweep), "omnifusion"])
def test_a_killed_conversion_leaves_nothing_that_looks_finished(original, tmp_path, arrays, to):
    source, output = original, tmp_path / "output"
    if to == "omnifusion":
        pytest.importorskip("torch")
        source = tmp_path / "native"
        save_native(source, C, arrays, tmp_path / "tokenizer")
    before = content(source)
    command = [sys.executable, "-c", KILLED, f"--source={source}", f"--output={output}", f"--to={to}"]
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "40"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists() and content(source) == before
    left = staging.unfinished(output)
    assert any(left.rglob("*")) and not is_native(left)
    (left / "of the first start").touch()
    done = subprocess.run([*command, "0"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and not left.exists() and not (output / "of the first start").exists(), (
        done.stderr
    )
    same(load_checkpoint(output).arrays, arrays)


def test_a_disk_without_room_is_refused_before_anything_is_written(original, tmp_path, arrays, monkeypatch):
    size = sum(a.nbytes for a in arrays.values())
    free = type("Usage", (), {"free": 2 * size - 1})
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: free)
    before = content(tmp_path)
    found = load_checkpoint(original, dtype="float32")
    with pytest.raises(
        CheckpointError, match=rf"native: {2 * size:,} bytes are needed, {2 * size - 1:,} are free"
    ):
        save_native(tmp_path / "native", found.config, found.arrays)
    with pytest.raises(CheckpointError, match=rf"back: {2 * size:,} bytes are needed"):
        export_original(load_checkpoint(original), tmp_path / "back", "float32", pickles=False)
    assert content(tmp_path) == before
    free.free = 2 * size
    save_native(tmp_path / "native", found.config, found.arrays)


def write_native(found, output):
    save_native(output, found.config, found.arrays, found.tokenizer)


def write_original(found, output):
    export_original(found, output, pickles=False)


@pytest.mark.parametrize("write", [write_native, write_original])
def test_a_disk_that_becomes_full_loses_nothing(original, tmp_path, arrays, write, monkeypatch):
    size, disk = sum(a.nbytes for a in arrays.values()), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        (disk / "kept").write_text("kept")
        before = content(original)
        monkeypatch.setattr(staging, "check_space", lambda *_: None)  # somebody else fills it meanwhile
        with pytest.raises(
            CheckpointError, match=rf"output: the disk became full.*{size:,} bytes are needed"
        ):
            write(load_checkpoint(original), disk / "output")
        assert [file.name for file in disk.iterdir()] == ["kept"] and content(original) == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_short_write_goes_on_and_a_full_disk_is_said(original, tmp_path, arrays, monkeypatch):
    calls, pwrite = 0, os.pwrite

    def short(descriptor, data, offset):
        nonlocal calls
        calls += 1
        if calls > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data[:2000], offset)

    written = to_foreign(
        {path: a for path, a in arrays.items() if path.startswith("special/")},
        {"E": ("special/eoi", SAME)} | {name: (f"special/{name}", SAME) for name in ("user", "bot", "soi")},
    )
    monkeypatch.setattr(os, "pwrite", short)
    weights.write_safetensors(tmp_path / "special.safetensors", written)
    same(weights.read_safetensors(tmp_path / "special.safetensors"), written)
    with pytest.raises(
        CheckpointError, match="the disk became full while it was written, and nothing was kept"
    ):
        export_original(load_checkpoint(original), tmp_path / "back", pickles=False)
    assert not list(tmp_path.glob("back*"))
