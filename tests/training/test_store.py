"""Runs whose workdir is in a store, gs://..., which stands in memory here."""

import json
import sys

import bucket
import numpy as np
import pytest
from conftest import ROOT
from etils import epath

import omnifusion_jax as of
from omnifusion_jax import paths
from omnifusion_jax.checkpoints.load import load_trained
from omnifusion_jax.checkpoints.native import open_native
from omnifusion_jax.config import CheckpointConfig, MeshConfig
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.run import train
from omnifusion_jax.training import mirror
from omnifusion_jax.training.mirror import Mirror
from omnifusion_jax.training.workdir import locked

sys.path.insert(0, str(ROOT))
from configs import tiny


@pytest.fixture(scope="module")
def store():
    with pytest.MonkeyPatch.context() as patch:
        server = bucket.opened(patch)
        yield epath.Path("gs://bucket")
        server.shutdown()
        server.server_close()


def config(steps):
    c = tiny.get_config("pretrain")
    c.mesh, c.model.decoder.layers, c.tokenizer = MeshConfig(1, 1), 1, "omnifusion-tiny-decoder"
    c.parts_from = {"image/encoders/0": "omnifusion-tiny-encoder"}
    c.train_parts = tiny.ALL_BUT_ENCODER
    c.optimizer.schedule = "constant"  # the same whatever the number of steps
    c.steps, c.batch_size, c.log_every, c.data.check = steps, 2, 1, "off"
    c.checkpoint = CheckpointConfig(every_steps=1, keep=2)
    return c


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A run in the store, in two goes, and the same on the disk in one."""
    here = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mirror, "close", lambda self: None)  # as if it was killed after its last checkpoint
        train(config(2), f"{store}/run")
    train(config(3), f"{store}/run", allow_change=True)
    train(config(3), here)
    return store / "run", here


def test_a_run_in_a_store_is_that_on_a_disk(run):
    there, here = run
    read = lambda file: [json.loads(line) for line in file.read_text().splitlines()]
    ours, theirs = read(there / "metrics.jsonl"), read(here / "metrics.jsonl")
    assert [row["train/loss"] for row in ours] == [row["train/loss"] for row in theirs] and len(ours) == 3
    assert sorted(path.name for path in (there / "checkpoints").iterdir()) == ["2", "3"]
    for name in ("config.json", "summary.json"):
        assert json.loads((there / name).read_text()) == json.loads((here / name).read_text())
    assert {path.name for path in there.iterdir()} == {path.name for path in here.iterdir()}
    (_, found), (_, expected) = open_native(there / "model"), open_native(here / "model")
    assert found.keys() == expected.keys()
    for path, a in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(a), err_msg=path)


def test_a_model_in_a_store_is_what_a_run_starts_from(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    there, here = run
    stored, arrays, tokenizer = load_trained(f"{there}/model", config(3).model)
    _, expected = open_native(here / "model")
    assert stored.decoder.layers == 1 and arrays.keys() == expected.keys()
    path = next(path for path in arrays if path.startswith("decoder/layers/"))
    np.testing.assert_array_equal(arrays[path][0], expected[path][0])
    # the tokenizer's library reads files of this machine alone
    assert (tokenizer / "tokenizer.json").read_bytes() == (here / "model/tokenizer.json").read_bytes()
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
