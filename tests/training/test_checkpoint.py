"""Checkpoints that were damaged, belong to another model, or meet a full or read-only disk."""

import errno
import os
import shutil
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from omnifusion_jax import hosts, sharding
from omnifusion_jax.config import CheckpointConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.hosts.company import Alone
from omnifusion_jax.training.checkpoint import Checkpoints, newest
from omnifusion_jax.training.step import TrainState


def state(step, size=400):
    """Its parameters say which step they are of."""
    params = {"image/adapter/linear/kernel": np.full((3, size), float(step), np.float32)}
    return TrainState(np.int32(step), np.int32(0), params, {"count": np.int32(step)})


def shapes(size=400):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), state(0, size))
    return target, jax.tree.map(lambda _: here, target)


def save(directory, *steps, **settings):
    checkpoints = Checkpoints(directory, CheckpointConfig(**settings))
    for step in steps:
        checkpoints.save(step, jax.tree.map(jax.numpy.asarray, state(step)), {"seen": 10 * step})
    checkpoints.close()


def restore(directory, size=400):
    """(step of the parameters, position) of what comes back, and the steps that are left."""
    checkpoints = Checkpoints(directory, CheckpointConfig())
    found = checkpoints.restore(*shapes(size))
    checkpoints.close()
    return found and (found[0].params["image/adapter/linear/kernel"][0, 0], int(found[0].step), found[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "checkpoints"
    save(directory, 1, 2, 3)
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3"]
    return directory


@pytest.fixture
def checkpoints(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def empty(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def cut(name):
    def harm(directory):
        file = directory / name
        os.truncate(file, file.stat().st_size // 2)

    return harm


def without(name):
    def harm(directory):
        for path in list(directory.rglob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return harm


HARM = {
    "an empty folder": empty,
    "no arrays": without("state"),
    "no position": without("position"),
    "half a position": cut("position/metadata"),
    "half a table of contents": cut("state/_METADATA"),
    "half a manifest": cut("state/manifest.ocdbt"),
    "no manifest": without("manifest.ocdbt"),
    "no data": without("d"),
}


@pytest.mark.parametrize("harm", HARM)
def test_the_one_before_a_damaged_checkpoint_is_used(checkpoints, harm, capfd):
    HARM[harm](checkpoints / "3")
    assert restore(checkpoints) == (2.0, 2, {"seen": 20})
    said = capfd.readouterr().out
    assert (
        "checkpoint 3 cannot be read" in said
        and f"It is kept as {checkpoints}.damaged/3" in said
        and "goes on from step 2" in said
    )
    assert (checkpoints.parent / "checkpoints.damaged" / "3").is_dir()
    save(checkpoints, 3)  # in its place
    assert restore(checkpoints) == (3.0, 3, {"seen": 30})


def test_with_several_hosts_the_run_ends_and_goes_on_from_the_one_before(checkpoints, monkeypatch):
    """Each may have read its part, and waits in Orbax for the others. The last one left is not moved."""
    monkeypatch.setattr(hosts, "here", Alone(0, 2))
    HARM["no arrays"](checkpoints / "3")
    with pytest.raises(CheckpointError, match=r"checkpoint 3 cannot be read .*from the one before it"):
        restore(checkpoints)
    assert (checkpoints.parent / "checkpoints.damaged" / "3").is_dir()
    assert restore(checkpoints) == (2.0, 2, {"seen": 20})
    HARM["no arrays"](checkpoints / "2")
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be read"):
        restore(checkpoints)
    assert (checkpoints / "2").is_dir()


def test_a_checkpoint_out_of_reach_is_not_taken_for_damaged(checkpoints, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fails)  # a disk that fails for a while
    with pytest.raises(CheckpointError, match="3 cannot be read now: Input/output error"):
        restore(checkpoints)
    monkeypatch.undo()
    assert restore(checkpoints)[0] == 3.0


def test_when_all_are_damaged_each_is_named_and_none_is_touched(checkpoints):
    empty(checkpoints / "2")
    cut("state/manifest.ocdbt")(checkpoints / "3")
    before = sorted(checkpoints.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        restore(checkpoints)
    said = str(caught.value)
    assert (
        f"{checkpoints}/3: " in said
        and f"{checkpoints}/2: " in said
        and "another --workdir" in said
        and "Copy one of them back" in said
    )
    assert (
        sorted(checkpoints.rglob("*")) == before and not checkpoints.with_name("checkpoints.damaged").exists()
    )


def test_a_checkpoint_of_another_model_is_not_damaged(checkpoints):
    with pytest.raises(CheckpointError, match="another model, freeze table or optimizer") as caught:
        restore(checkpoints, size=500)
    assert "params/image/adapter/linear/kernel: (3, 400), needed (3, 500)" in str(caught.value)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "3"]


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 8}, {"data": 8, "fsdp": 1}, {"fsdp": 2, "tensor": 4}, {"fsdp": 1}]
)
def test_another_mesh_gets_every_bit(tmp_path, sizes):
    """Saved from eight devices, an axis each; read onto others, each of which gets its part."""
    rng, path = np.random.default_rng(0), "image/adapter/linear/kernel"
    kernel, axes = rng.normal(size=(16, 24, 8)).astype(np.float32), ("width", "kv_heads", None)

    def placed(mesh):
        like = TrainState(np.int32(3), np.int32(0), {path: kernel}, {"moment": kernel * 1e-9})
        where = lambda a: sharding.sharding(mesh, axes if a.ndim else (), np.shape(a))
        return like, jax.tree.map(where, like)

    like, there = placed(sharding.make_mesh(data=2, fsdp=2, tensor=2))
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    checkpoints.save(3, jax.device_put(like, there), {"seen": 3})
    checkpoints.close()
    _, here = placed(sharding.make_mesh(**sizes))
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), like)
    checkpoints = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    found, position = checkpoints.restore(target, here)
    checkpoints.close()
    assert position == {"seen": 3}
    for a, expected, wanted in zip(*map(jax.tree.leaves, (found, like, here)), strict=True):
        np.testing.assert_array_equal(a, expected)
        assert a.sharding == wanted


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "checkpoints") is None and newest(tmp_path / "checkpoints") is None


@pytest.fixture
def disk(tmp_path):
    """A disk of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], check=False, capture_output=True
    ).returncode:
        pytest.skip("a small disk cannot be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_full_disk_is_one_message_and_older_checkpoints_are_whole(disk, meanwhile, monkeypatch):
    directory = disk / "checkpoints"
    save(directory, 1, 2)
    free = shutil.disk_usage(disk).free
    (disk / "other").write_bytes(bytes(free - 16384))
    noise = (
        np.random.default_rng(0).normal(size=(3, 40000)).astype(np.float32)
    )  # 480 kB that no compression makes small
    large = state(3)._replace(params={"image/adapter/linear/kernel": noise})
    checkpoints = Checkpoints(directory, CheckpointConfig())
    if meanwhile:  # somebody else fills it while it is written
        monkeypatch.setattr(Checkpoints, "check_space", lambda *_: None)
    reason = "No space left on device" if meanwhile else "a checkpoint needs 480,012 bytes, .* are free"
    with pytest.raises(
        CheckpointError, match=rf"checkpoints cannot be written: {reason}\. Finished checkpoints are whole"
    ):
        checkpoints.save(3, jax.tree.map(jax.numpy.asarray, large), {})
        checkpoints.close()
    (disk / "other").unlink()
    assert restore(directory) == (2.0, 2, {"seen": 20})
    save(directory, 4)
    assert sorted(path.name for path in directory.iterdir()) == ["2", "4"]  # what was half written is gone


def test_a_read_only_disk_is_one_message(disk):
    save(disk / "checkpoints", 1)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
        save(disk / "checkpoints", 2)
    with pytest.raises(CheckpointError, match="cannot be written: Read-only file system"):
        save(disk / "new", 1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"every_steps": 3}, [3, 6]),
        ({"every_steps": 0}, []),
        ({"every_steps": 0, "every_minutes": 2}, [3, 6]),
        ({"every_steps": 4, "every_minutes": 2}, [3, 4, 7, 8]),
    ],
)
def test_a_checkpoint_is_due_by_steps_and_by_minutes(tmp_path, monkeypatch, settings, expected):
    """A step takes 50 s."""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(**settings))
    due = []
    for step in range(1, 9):
        now += 50
        if checkpoints.due(step):
            due.append(step)
            checkpoints.saved_at = now
    assert due == expected
    checkpoints.close()
