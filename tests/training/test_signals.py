"""SIGTERM and Ctrl-C: in a process of its own, in the loop, and as a user meets them on the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import FAST_COMPILATION, ROOT

from omnifusion_jax.config import MeshConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.run import train
from omnifusion_jax.training import signals
from omnifusion_jax.training.signals import Stop, Stopped
from omnifusion_jax.training.workdir import locked

sys.path.insert(0, str(ROOT))
from configs import tiny


def test_a_signal_raises_where_it_comes():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped), Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert stop.asked == signal.SIGTERM and stop.status == 0 and signal.getsignal(signal.SIGTERM) is before


def test_a_deferred_signal_waits_for_the_check():
    reached = []
    with pytest.raises(Stopped), Stop() as stop, stop.deferred():
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        reached.append("after the signal")
        stop.check()
        reached.append("after the check")
    assert reached == ["after the signal"] and stop.status == 130


def test_a_ctrl_c_after_a_scheduler_s_stop_is_the_first(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with pytest.raises(Stopped), Stop() as stop, stop.deferred():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the thread that listens
    assert not ended and stop.status == 0


@pytest.mark.parametrize("inside", [True, False])
def test_within_a_deferred_block_evaluation_is_cut_off(inside):
    reached = []
    with pytest.raises(Stopped), Stop() as stop, stop.deferred():
        if not inside:
            os.kill(os.getpid(), signal.SIGTERM)
        with stop.deferred(False):
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("not here")
    assert not reached


def test_a_deferred_block_that_ends_does_not_forget():
    with pytest.raises(Stopped), Stop() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")


def test_with_several_hosts_a_signal_waits_until_all_know_of_it():
    reached = []
    with pytest.raises(Stopped), Stop(hosts=2) as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        stop.check()
        with stop.deferred(False):  # an evaluation, which is of all hosts, is not cut off by one
            stop.check()
        stop.agree([None, None])
        reached.append("before they agreed")
        stop.agree([stop.asked, None])
        reached.append("after they agreed")
    assert reached == ["before they agreed"] and stop.status == 0


def test_a_signal_to_another_host_stops_this_one():
    with pytest.raises(Stopped) as stopped, Stop(hosts=2, on_term=75) as stop, stop.deferred():
        stop.agree([None, int(signal.SIGTERM)])
    assert stop.asked == signal.SIGTERM and stopped.value.status == stop.status == 75
    with pytest.raises(Stopped), Stop(on_term=75) as alone:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert alone.status == 130


HASHES = """
import hashlib, importlib.util, sys
spec = importlib.util.spec_from_file_location("signals", sys.argv[1])
signals = importlib.util.module_from_spec(spec)
spec.loader.exec_module(signals)
with signals.Stop() as stop, stop.deferred():
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)  \
# minutes in C, as a compilation is: no handler of Python's runs
"""


def test_a_second_ctrl_c_ends_at_once():
    child = subprocess.Popen(
        [sys.executable, "-c", HASHES, signals.__file__],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "begun\n"
    child.send_signal(signal.SIGINT)
    said = [child.stderr.readline(), child.stderr.readline()]
    assert child.poll() is None and "once more ends it at once" in said[1]
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=5) == 130


def rows(workdir):
    file = Path(workdir) / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else []
    )


def begin(workdir, done, *options):
    """Starts a training on the command line and waits for three lines of metrics after step `done`."""
    command = [
        sys.executable,
        "-m",
        "omnifusion_jax.train",
        "--config=configs/tiny.py:pretrain",
        f"--workdir={workdir}",
        *options,
    ]
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.monotonic() + 600
    while (
        sum(row["step"] > done for row in rows(workdir)) < 3
        and child.poll() is None
        and time.monotonic() < until
    ):
        time.sleep(0.02)
    return child


def test_a_run_that_is_stopped_goes_on_as_if_it_had_not_been(tmp_path, capfd):
    """Once by a scheduler, once by Ctrl-C, to the end by the library: one curve, that of a run in one go."""
    workdir, steps = tmp_path / "run", 20
    options = ("--config.batch_size=2", f"--config.steps={steps}", "--config.log_every=1")
    child = begin(workdir, 0, *options)
    with pytest.raises(ConfigError, match=f"in use by process {child.pid} "), locked(workdir):
        pass
    asked = time.monotonic()
    child.send_signal(signal.SIGTERM)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 0 and time.monotonic() - asked < 30, said
    first = max(row["step"] for row in rows(workdir))
    assert 3 <= first < steps and f"stopped by SIGTERM: the state after step {first} is saved" in said
    assert (
        said.strip()
        .splitlines()[-1]
        .endswith(f"--config=configs/tiny.py:pretrain --workdir={workdir} {' '.join(options)}")
    )
    assert (
        "Traceback" not in said
        and (workdir / "checkpoints" / str(first)).is_dir()
        and not (workdir / "summary.json").exists()
    )

    child = begin(workdir, first, *options)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=120)
    assert child.returncode == 130, said
    second = max(row["step"] for row in rows(workdir))
    assert (
        first + 3 <= second < steps
        and f"resuming from step {first}" in said
        and f"stopped by SIGINT: the state after step {second}" in said
    )
    assert "Traceback" not in said

    config = tiny.get_config("pretrain")
    config.batch_size, config.steps, config.log_every = 2, steps, 1
    config.mesh = MeshConfig(1, 1)  # of eight devices in this process
    config.validate()
    assert train(config, workdir) == {"steps": steps, "data/skipped": 0, "data/too_long": 0, "data/cut": 0}
    train(config, tmp_path / "whole")
    cut, whole = rows(workdir), rows(tmp_path / "whole")
    assert [row["step"] for row in cut] == [row["step"] for row in whole] == list(range(1, steps + 1))
    for one, other in zip(cut, whole, strict=True):
        assert one["train/loss"] == pytest.approx(
            other["train/loss"], rel=2e-3
        )  # on one device, and on one of eight
    capfd.readouterr()
    train(config, workdir)
    assert (
        f"all {steps} steps are done: nothing is left to train" in capfd.readouterr().out
        and rows(workdir) == cut
    )
