"""The library's own checkpoint directory."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
import tiny

from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder, load_encoder, load_trained
from omnifusion_jax.checkpoints.native import open_native, read_config, save_native
from omnifusion_jax.checkpoints.storage.placement import place
from omnifusion_jax.config import RopeScaling
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.nested import nested

C = tiny.config()
UP = "image/adapter/layer/feed_forward/up/kernel"


@pytest.fixture(scope="module")
def arrays():
    return tiny.arrays(C)


@pytest.fixture
def saved(tmp_path, arrays):
    tiny.make_tokenizer(tmp_path / "tokenizer")
    save_native(tmp_path / "model", C, arrays, tmp_path / "tokenizer")
    return tmp_path / "model"


def same(a, b):
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]))


def test_what_is_saved_is_loaded(saved, arrays):
    config, loaded = open_native(saved)
    assert config == C
    same(loaded, arrays)
    whole = load_checkpoint(saved)
    assert (whole.format, whole.tokenizer, whole.parts) == ("native", saved, tuple(C.parts))
    config, found = load_encoder(saved)
    assert config == C.image.encoders[0] and set(found) == {
        path for path in arrays if path.startswith("image/encoders/")
    }
    assert load_decoder(saved)[0] == C.decoder and load_decoder(saved)[2] == saved
    assert not saved.with_name("model.unfinished").exists()


def test_a_part_comes_in_the_type_that_is_asked_for(saved):
    for arrays in (load_encoder(saved, dtype="bfloat16")[1], load_decoder(saved, dtype="bfloat16")[1]):
        assert {str(a.dtype) for a in arrays.values()} == {"bfloat16"}


def test_types_are_kept_unless_one_is_asked_for(tmp_path):
    half = tiny.arrays(C, "image/adapter", dtype=ml_dtypes.bfloat16)
    save_native(tmp_path / "model", C, half)
    same(open_native(tmp_path / "model")[1], half)
    same(
        open_native(tmp_path / "model", dtype="float32")[1],
        {path: a.astype(np.float32) for path, a in half.items()},
    )


def test_eight_devices_to_one_and_back(tmp_path, arrays):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(a):
        axis = next((i for i, n in enumerate(a.shape) if n % 8 == 0), None)
        return jax.sharding.NamedSharding(
            mesh, jax.P(*[None] * (axis or 0), *(() if axis is None else ("fsdp",)))
        )

    shardings = {path: spread(a) for path, a in arrays.items()}
    save_native(
        tmp_path / "eight", C, {path: jax.device_put(a, shardings[path]) for path, a in arrays.items()}
    )
    one = {path: jax.numpy.asarray(a) for path, a in open_native(tmp_path / "eight")[1].items()}
    same(one, arrays)
    save_native(tmp_path / "one", C, one)
    eight = {path: place(a, shardings[path]) for path, a in open_native(tmp_path / "one")[1].items()}
    same(eight, arrays)
    assert all(a.sharding == shardings[path] for path, a in eight.items())


def test_settings_inside_settings_come_back(tmp_path):
    stretched = dataclasses.replace(
        C.decoder, family="llama", window=None, tied=True, rope_scaling=RopeScaling(4.0, 1.0, 2.0, 64)
    )
    c = dataclasses.replace(C, decoder=stretched)
    arrays = tiny.arrays(c, "decoder")
    save_native(tmp_path / "model", c, arrays)
    found, loaded = open_native(tmp_path / "model")
    assert found == c and isinstance(found.decoder.rope_scaling, RopeScaling)
    same(loaded, arrays)


def test_part_of_a_model(tmp_path, arrays):
    trained = {path: a for path, a in arrays.items() if path.startswith(("image/adapter/", "special/"))}
    save_native(tmp_path / "phase1", C, trained)
    assert read_config(tmp_path / "phase1") == (C, ["image/adapter", "special"])
    found = load_checkpoint(tmp_path / "phase1")
    same(found.arrays, trained)
    assert found.parts == ("image/adapter", "special") and found.tokenizer is None
    with pytest.raises(CheckpointError, match="holds no decoder, only image/adapter, special"):
        load_decoder(tmp_path / "phase1")
    del trained[UP]
    with pytest.raises(CheckpointError, match=f"{UP}: missing"):
        save_native(tmp_path / "half", C, trained)
    assert not (tmp_path / "half").exists()


def test_a_checkpoint_with_another_one_inside_is_itself(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "outer")
    shutil.copytree(saved, tmp_path / "outer" / "model")
    assert load_trained(tmp_path / "outer", C)[0] == load_trained(saved, C)[0]


def test_the_folder_of_a_run_is_not_its_model(saved):
    for read in (load_checkpoint, lambda source: load_trained(source, C)):
        with pytest.raises(CheckpointError, match=rf"folder of a training run; its model is {saved}$"):
            read(saved.parent)


def test_a_transposed_array_does_not_fit(tmp_path, arrays):
    with pytest.raises(CheckpointError, match=UP + r": has shape \[48, 32\], \[32, 48\] is needed"):
        save_native(tmp_path / "model", C, arrays | {UP: arrays[UP].T})


def test_every_misfit_is_in_one_error(saved, arrays):
    wrong = {path: a for path, a in arrays.items() if path != "special/bot"} | {
        "decoder/bias": np.ones(3),
        "image/adapter/layer/feed_forward/up/kernel": np.ones((2, 2)),
    }
    shutil.rmtree(saved / "arrays")
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(saved / "arrays", nested(wrong, "/"))
    with pytest.raises(CheckpointError) as caught:
        open_native(saved)
    for line in (
        "3 tensors do not fit",
        "special/bot: missing",
        "decoder/bias: the model has no such array",
        f"{UP}: has shape [2, 2], [32, 48]",
    ):
        assert line in str(caught.value)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax leaves reads of the other arrays behind
def test_damage_is_named(saved):
    largest = max((f for f in (saved / "arrays").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    _, damaged = open_native(saved)
    with pytest.raises(CheckpointError, match="model/arrays cannot be read"):
        for a in damaged.values():
            np.asarray(a)
    shutil.rmtree(saved / "arrays")
    with pytest.raises(CheckpointError, match="not a native checkpoint"):
        open_native(saved)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"version": 2}, "version is 2"),
        ({"parts": None}, "lacks parts"),
        ({"model": {"decoders": {}}}, "has no field decoders"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(saved, change, said):
    values = json.loads((saved / "config.json").read_text()) | change
    (saved / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None})
    )
    with pytest.raises((CheckpointError, ConfigError), match=said):
        open_native(saved)


def test_a_finished_directory_is_not_overwritten(saved, arrays):
    before = {file: file.stat().st_mtime_ns for file in saved.rglob("*")}
    with pytest.raises(CheckpointError, match="exists already and is not overwritten"):
        save_native(saved, C, arrays)
    assert {file: file.stat().st_mtime_ns for file in saved.rglob("*")} == before


def test_an_interrupted_save_leaves_nothing_that_looks_finished(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(
        "omnifusion_jax.checkpoints.native.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save_native(tmp_path / "model", C, arrays)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "model.unfinished").mkdir()  # what a killed process leaves
    (tmp_path / "model.unfinished" / "old").touch()
    save_native(tmp_path / "model", C, arrays)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["arrays", "config.json"]


JOB = """
import sys, jax, numpy as np, tiny
from omnifusion_jax.checkpoints.native import open_native, save_native
from omnifusion_jax.checkpoints.storage.placement import place
from omnifusion_jax.errors import CheckpointError
address, process, directory = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
arrays = tiny.arrays(tiny.config(), "image/adapter")
shardings = {path: jax.sharding.NamedSharding(mesh, jax.P("fsdp" if a.shape[0] % 4 == 0 else None)) \
for path, a in arrays.items()}
save_native(directory, tiny.config(), {p: jax.make_array_from_callback(a.shape, shardings[p], a.__getitem__) \
for p, a in arrays.items()})
for path, a in open_native(directory)[1].items():
    for shard in place(a, shardings[path]).addressable_shards:
        np.testing.assert_array_equal(shard.data, arrays[path][shard.index])
for path, a in open_native(directory)[1].items():
    np.testing.assert_array_equal(a, arrays[path])
try:
    save_native(directory, tiny.config(), arrays)
except CheckpointError:
    print("well")
"""


def test_two_processes_save_one_directory_and_load_it(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    command = [sys.executable, "-c", JOB, address]
    jobs = [
        subprocess.Popen(
            [*command, n, tmp_path / "model"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in "01"
    ]
    for job in jobs:
        out, err = job.communicate(timeout=120)
        assert job.returncode == 0 and out.endswith("well\n"), err
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
