"""Runs on two hosts, which are processes of this machine with four simulated devices each.

All are the same run: what two hosts do is compared with what one process with eight devices does.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import FAST_COMPILATION, ROOT
from numpy.testing import assert_allclose

from omnifusion_jax.checkpoints.native import open_native
from omnifusion_jax.run import train

sys.path.insert(0, str(ROOT))
from configs import tiny

STEPS, SILENCE = 6, 10.0
SETTINGS = {
    "steps": STEPS,
    "model": {"decoder": {"layers": 1}},
    "tokenizer": "omnifusion-tiny-decoder",
    "parts_from": {"image/encoders/0": "omnifusion-tiny-encoder"},
    "train_parts": tiny.ALL_BUT_ENCODER,
    "batch_size": 8,
    "log_every": 1,
    "mesh": {"data": 4, "fsdp": 2},
    "checkpoint": {"every_steps": 2},
    "optimizer": {"learning_rate": 1e-4},
}
PACKED = {
    "data": {"packing": True, "row_length": 128, "check": "off"},
    "eval": {"path": "synthetic:held-out", "count": 8, "max_new_tokens": 2},
}
FILES = {"data": {"check": "off"}, "eval": {"path": ""}}
TOLD = {  # of a host that is killed, by the other; the first keeps the store of both
    0: "cannot be reached: it died",
    1: "has given no sign of life for 10 s",
}


def flags(settings, name="config"):
    for key, value in settings.items():
        if isinstance(value, dict) and key != "parts_from":
            yield from flags(value, f"{name}.{key}")
        else:
            yield f"--{name}.{key}={value}"


def config(settings):
    c = tiny.get_config("pretrain")

    def put(at, values):
        for key, value in values.items():
            if isinstance(value, dict) and key != "parts_from":
                put(getattr(at, key), value)
            else:
                setattr(at, key, value)

    put(c, SETTINGS)
    put(c, settings)
    return c.validate()


class Two:
    """A run of two hosts, begun."""

    def __init__(self, workdir, settings=FILES, *more):
        run = [*flags(SETTINGS), *flags(settings), f"--workdir={workdir}", f"--host_timeout={SILENCE}"]
        module = [sys.executable, "-m", "omnifusion_jax.train", "--config=configs/tiny.py:pretrain"]
        launch = [sys.executable, "launch/local.py", "--processes=2", "--devices=4", "--"]
        self.workdir, self.file = workdir, workdir.with_suffix(".log")
        environment = {**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(ROOT)}
        with open(self.file, "w") as log:
            self.process = subprocess.Popen(
                [*launch, *module, *run, *more], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    @property
    def said(self):
        return self.file.read_text()

    def after(self, step):
        """Waits until the metrics have this step."""
        until = time.monotonic() + 300
        while not any(row["step"] >= step for row in rows(self.workdir)):
            assert self.process.poll() is None and time.monotonic() < until, self.said[-4000:]
            time.sleep(0.02)
        return self

    def children(self):
        """The process ids of the hosts."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return sorted(map(int, found.stdout.split()))

    def end(self, status=0):
        assert self.process.wait(300) == status, self.said[-6000:]
        return self.said


def rows(workdir):
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(workdir):
    return [row["train/loss"] for row in rows(workdir) if "train/loss" in row]


def same(workdir, other):
    """Whether two runs have one curve and one model."""
    assert len(losses(workdir)) == len(losses(other)) == STEPS
    assert_allclose(losses(workdir), losses(other), rtol=1e-6)
    _, ours = open_native(workdir / "model")
    _, theirs = open_native(other / "model")
    assert ours.keys() == theirs.keys()
    for path in ours.keys() - {"image/adapter/layer/attention/key/bias"}:  # whose true gradient is 0
        assert_allclose(np.asarray(ours[path]), np.asarray(theirs[path]), atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of a run of one process, for each way to fill rows."""
    found = {}
    for name, settings in (("one a row", FILES), ("packed", PACKED)):
        found[name] = tmp_path_factory.mktemp("alone") / "run"
        train(config(settings), found[name])
    return found


def test_sigterm_to_one_host_stops_all_after_one_step_and_one_process_goes_on(alone, tmp_path):
    two = Two(tmp_path / "run").after(2)
    os.kill(two.children()[1], signal.SIGTERM)
    said = two.end()
    step = max(row["step"] for row in rows(two.workdir))
    assert 2 <= step < STEPS and (two.workdir / "checkpoints" / str(step)).is_dir()
    assert said.count(f"stopped by SIGTERM: the state after step {step} is saved") == 1
    assert "0 | step 1/6" in said and "1 | step" not in said  # the first host says everything
    train(config(FILES), two.workdir)
    same(two.workdir, alone["one a row"])


def killed(two, number):
    """Kills a host of a run. Returns the lines in which the other names it, which is soon."""
    victim, since = two.children()[number], time.monotonic()
    os.kill(victim, signal.SIGKILL)
    said = two.end(128 + signal.SIGKILL)
    assert time.monotonic() - since < SILENCE + 15
    victim = f"host {number} (process {victim} on "
    told = [line for line in said.splitlines() if victim in line]
    assert told and all(line.startswith(f"{1 - number} |") for line in told), said[-6000:]
    return told


@pytest.mark.parametrize("victims", [(0,), pytest.param((1, 0), marks=pytest.mark.sweep)])
def test_when_a_host_is_killed_the_other_names_it_and_both_go_on_later(alone, tmp_path, victims):
    for victim in victims:
        told = killed(Two(tmp_path / "run", PACKED).after(2 if victim else 4), victim)
        assert any(TOLD[victim] in line for line in told)
    two = Two(tmp_path / "run", PACKED)
    assert "resuming from step" in two.end()
    same(two.workdir, alone["packed"])
    summary = [json.loads((where / "summary.json").read_text()) for where in (two.workdir, alone["packed"])]
    assert summary[0] == summary[1] and summary[0]["eval/questions"] == 8


def test_an_error_of_one_host_ends_all_with_its_message_and_the_state_saved(tmp_path):
    """Record 22 is of row 6, which host 1 makes, in the third batch; its picture is not there."""
    talk = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A circle."}]}
    lines = [talk | ({"images": ["lost.png"]} if i == 22 else {}) for i in range(64)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"path": str(tmp_path / "talks.jsonl"), "images": str(tmp_path), "shuffle": False, "check": "off"}
    two = Two(tmp_path / "run", {"data": data, "eval": {"path": ""}})
    said = two.end(1)
    assert "no next batch: the state after step 2 is saved" in said
    assert (two.workdir / "checkpoints" / "2").is_dir()
    mine, theirs = (
        next(line for line in said.splitlines() if line.startswith(f"{i} | error:")) for i in (1, 0)
    )
    assert "lost.png" in mine and "talks.jsonl:23" in mine
    assert theirs.startswith("0 | error: host 1 (process") and mine.removeprefix("1 | error: ") in theirs
