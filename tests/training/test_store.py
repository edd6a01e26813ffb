"""Runs whose workdir is in a store, gs://..., which stands in memory here."""

import json

import bucket
import numpy as np
import pytest
from etils import epath

import omnifusion_jax as of
from omnifusion_jax import paths
from omnifusion_jax.checkpoints.native import open_native
from omnifusion_jax.config import CheckpointConfig, MeshConfig
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.run import train
from omnifusion_jax.training import mirror
from omnifusion_jax.training.mirror import Mirror
from omnifusion_jax.training.workdir import locked


@pytest.fixture(scope="module")
def store():
    with pytest.MonkeyPatch.context() as patch:
        server = bucket.opened(patch)
        yield epath.Path("gs://bucket")
        server.shutdown()
        server.server_close()


def config(**settings):
    from configs import tiny

    c = tiny.get_config("pretrain")
    c.mesh = MeshConfig(1, 1)
    c.steps, c.batch_size, c.log_every, c.data.check = 3, 2, 1, "off"
    c.checkpoint = CheckpointConfig(every_steps=1, keep=2)
    for name, value in settings.items():
        setattr(c, name, value)
    return c


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A run in the store in two goes, and the same on the disk."""
    here = tmp_path_factory.mktemp("run")
    train(config(), f"{store}/run")
    train(config(steps=4), f"{store}/run", allow_change=True)
    train(config(steps=3), here)
    train(config(steps=4), here, allow_change=True)
    return store / "run", here


def test_a_run_in_a_store_is_that_on_a_disk(run):
    there, here = run
    read = lambda file: [json.loads(line) for line in file.read_text().splitlines()]
    ours, theirs = read(there / "metrics.jsonl"), read(here / "metrics.jsonl")
    assert [row["train/loss"] for row in ours] == [row["train/loss"] for row in theirs] and len(ours) == 4
    assert sorted(path.name for path in (there / "checkpoints").iterdir()) == ["3", "4"]
    for name in ("config.json", "summary.json"):
        assert json.loads((there / name).read_text()) == json.loads((here / name).read_text())
    assert {path.name for path in there.iterdir()} == {path.name for path in here.iterdir()}
    (_, found), (_, expected) = open_native(there / "model"), open_native(here / "model")
    assert found.keys() == expected.keys()
    for path, a in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(a), err_msg=path)


def test_a_run_starts_from_a_model_in_a_store(run, tmp_path, capsys):
    there, _ = run
    assert train(config(steps=1, init_from=f"{there}/model"), tmp_path)["steps"] == 1
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    fresh = json.loads((there / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] != fresh["train/loss"]
    with pytest.raises(CheckpointError, match="gs://bucket/nothing: there is no such folder"):
        of.load("gs://bucket/nothing")


def test_a_store_has_no_lock_and_that_is_said(store, capsys):
    with locked(store / "two"):
        pass
    said = capsys.readouterr().out
    assert "gs://bucket/two cannot be locked: see to it that no other run writes there" in said
    assert (store / "two" / "lock").read_text().startswith("process ")


def test_what_grows_is_copied_now_and_then_and_at_the_end(store, monkeypatch):
    (store / "grows" / "old.txt").write_text("old\n")
    one = Mirror(store / "grows", "old.txt", "not there")
    assert (one.here / "old.txt").read_text() == "old\n"
    (one.here / "inner").mkdir()
    (one.here / "inner" / "new.txt").write_text("new\n")
    one.grown()
    assert not (store / "grows" / "inner" / "new.txt").exists()
    monkeypatch.setattr(mirror, "EVERY", 0.0)
    one.grown()
    assert (store / "grows" / "inner" / "new.txt").read_text() == "new\n"
    (one.here / "old.txt").write_text("older\n")
    one.close()
    assert (store / "grows" / "old.txt").read_text() == "older\n" and not one.here.exists()


def test_a_place_on_this_machine_stands_for_itself(tmp_path):
    one = Mirror(tmp_path, "metrics.jsonl")
    one.close()
    assert one.here == tmp_path and tmp_path.exists() and not paths.remote(tmp_path)


def test_a_store_without_its_package_says_what_to_install(monkeypatch):
    with pytest.raises(ConfigError, match=r"s3://bucket/run: .*pip install .*s3fs"):
        paths.located("s3://bucket/run")
