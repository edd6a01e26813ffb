"""The figures of metrics.jsonl, computed by hand."""

import json
import math
import re
import sys
import time
from pathlib import Path

import jax
import pytest

from omnifusion_jax import sharding
from omnifusion_jax.chips import CHIPS
from omnifusion_jax.config import TrainConfig
from omnifusion_jax.training import meters
from omnifusion_jax.training.meters import memory, peak
from omnifusion_jax.training.monitor import Monitor, resumed


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(time, "time", lambda: 1e9 + clock.now)
    return clock


def step(monitor, clock, n, loss, targets, tokens, images, seconds=2.0, wait=0.5, norm=1.0, bad=0):
    clock.now += seconds
    monitor.wait += wait
    monitor.step(
        n,
        {"loss": loss, "targets": targets, "tokens": tokens, "images": images, "grad_norm": norm, "bad": bad},
        {"skipped": 2 * n},
    )


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_figures_of_an_interval(tmp_path, clock):
    monitor = Monitor(tmp_path, steps=7, start=0, every=3, memory=lambda: 4096)
    step(monitor, clock, 1, 7.0, 10, 100, 4)
    step(monitor, clock, 2, 4.0, 30, 200, 4, norm=5.0)
    with monitor.pause():
        clock.now += 1000
    step(monitor, clock, 3, 2.0, 10, 400, 2, norm=3.0)
    step(monitor, clock, 4, math.nan, 50, 1000, 4, norm=math.nan, bad=1)
    step(monitor, clock, 5, 1.0, 5, 1000, 4, bad=1)
    step(monitor, clock, 6, 3.0, 15, 1000, 4, bad=1)
    step(monitor, clock, 7, math.inf, 15, 500, 4, norm=math.inf, bad=2)  # the last has its line too
    monitor.close()
    first, second, third, last = rows(tmp_path)
    assert first["step"] == 1 and first["train/loss"] == 7.0  # before anything is learned
    assert second == {
        "step": 3,
        "train/loss": (4.0 * 30 + 2.0 * 10) / 40,
        "train/tokens_per_s": 600 / 4,
        "train/images_per_s": 6 / 4,
        "train/input_wait": 1.0 / 4,
        "train/memory": 4096,
        "train/goodput": 6 / 1006,
        "data/skipped": 6,
        "train/grad_norm": 3.0,
        "train/bad_steps": 0,
    }
    assert (
        third["train/loss"] == (1.0 * 5 + 3.0 * 15) / 20 and third["train/bad_steps"] == 1
    )  # of finite steps
    assert third["train/tokens_per_s"] == 3000 / 6 and third["train/images_per_s"] == 12 / 6  # of all
    assert last == {
        "step": 7,
        "train/tokens_per_s": 250.0,
        "train/images_per_s": 2.0,
        "train/input_wait": 0.25,
        "train/memory": 4096,
        "train/goodput": 10 / 1014,  # two steps were skipped
        "train/bad_steps": 2,
        "data/skipped": 14,
    }


def test_an_objective_s_own_figures_are_means_as_the_loss_is(tmp_path, clock):
    """Over the targets of an interval, steps whose loss is no number left out, across a resume."""
    told = lambda monitor, n, loss, targets, margin: monitor.step(
        n, {"loss": loss, "targets": targets, "grad_norm": 1.0, "bad": 0, "objective/margin": margin}, {}
    )
    monitor = Monitor(tmp_path, steps=4, start=0, every=4)
    told(monitor, 1, 1.0, 9, 0.25)
    told(monitor, 2, 1.0, 10, 1.0)
    begun = json.loads(json.dumps(monitor.interval()))
    monitor.close()
    monitor = Monitor(tmp_path, steps=4, start=2, every=4, begun=begun)
    told(monitor, 3, math.nan, 50, math.nan)
    told(monitor, 4, 1.0, 30, 3.0)
    monitor.close()
    first, last = rows(tmp_path)
    assert first["train/margin"] == 0.25 and last["train/margin"] == (1.0 * 10 + 3.0 * 30) / 40


def test_an_interval_goes_on_where_it_was_saved(tmp_path, clock):
    monitor = Monitor(tmp_path, steps=4, start=0, every=4)
    step(monitor, clock, 1, 7.0, 10, 100, 4)
    step(monitor, clock, 2, 4.0, 30, 200, 4)
    saved = json.loads(json.dumps(monitor.interval()))
    step(monitor, clock, 3, 9.0, 30, 999, 4)  # done, not saved
    monitor.close()
    clock.now = 5.0  # another process
    monitor = Monitor(tmp_path, steps=4, start=2, every=4, begun=saved)
    step(monitor, clock, 3, 2.0, 10, 400, 2)
    step(monitor, clock, 4, 1.0, 40, 400, 2)
    monitor.close()
    first, last = rows(tmp_path)
    assert first["step"] == 1 and last["step"] == 4
    assert last["train/loss"] == (4.0 * 30 + 2.0 * 10 + 1.0 * 40) / 80
    assert (
        last["train/tokens_per_s"] == 1000 / 6
        and last["train/images_per_s"] == 8 / 6
        and last["train/input_wait"] == 1.5 / 6
    )


def test_mfu_is_a_share_of_the_peak_and_a_sum_over_parts(tmp_path, clock):
    """Steps of 2 s on devices that do at best 1000 operations a second together."""
    monitor = Monitor(tmp_path, steps=4, start=0, every=2, peak=1000.0)
    of_parts = {"flops/encoder": 100.0, "flops/adapter": 20.0, "flops/decoder": 400.0, "flops/head": 80.0}
    common = {"loss": 1.0, "targets": 1, "tokens": 1, "images": 1, "grad_norm": 1.0, "bad": 0}
    for n in range(1, 5):
        clock.now += 2.0
        monitor.step(n, common | {name: n * value for name, value in of_parts.items()}, {})
    monitor.close()
    last = rows(tmp_path)[-1]
    shares = {name: last[f"train/mfu/{name}"] for name in ("encoder", "adapter", "decoder", "head")}
    expected = {"encoder": 700 / 4, "adapter": 140 / 4, "decoder": 2800 / 4, "head": 560 / 4}
    assert shares == pytest.approx({name: value / 1000 for name, value in expected.items()}, rel=1e-12)
    assert last["train/mfu"] == pytest.approx(4200 / 4 / 1000, rel=1e-12)


def test_goodput_counts_restarts_and_what_they_repeat(tmp_path, clock):
    monitor = Monitor(tmp_path, steps=4, start=0, every=1)
    with monitor.pause():
        clock.now += 5  # compiles
    step(monitor, clock, 1, 7.0, 10, 100, 4, seconds=3)
    step(monitor, clock, 2, 4.0, 30, 200, 4, seconds=2)
    saved = json.loads(json.dumps(monitor.interval()))
    step(monitor, clock, 3, 4.0, 30, 200, 4, seconds=2)  # will be done again
    monitor.close()
    clock.now += 100  # nobody is there
    monitor = Monitor(tmp_path, steps=4, start=2, every=1, begun=saved)
    step(monitor, clock, 3, 4.0, 30, 200, 4, seconds=2)
    step(monitor, clock, 4, 4.0, 30, 200, 4, seconds=6)
    monitor.close()
    found = [row["train/goodput"] for row in rows(tmp_path)]
    assert found == [3 / 8, 5 / 10, 7 / 114, 13 / 120]


def test_goodput_counts_an_interval_that_was_cut_once(tmp_path, clock):
    monitor = Monitor(tmp_path, steps=4, start=0, every=4)
    step(monitor, clock, 1, 7.0, 10, 100, 4)
    step(monitor, clock, 2, 4.0, 30, 200, 4)
    saved = json.loads(json.dumps(monitor.interval()))
    monitor.close()
    clock.now += 10  # nobody is there
    monitor = Monitor(tmp_path, steps=4, start=2, every=4, begun=saved)
    step(monitor, clock, 3, 4.0, 30, 200, 4)
    step(monitor, clock, 4, 4.0, 30, 200, 4)
    monitor.close()
    assert rows(tmp_path)[-1]["train/goodput"] == 8 / 18


def test_memory_of_the_fullest_device_or_of_the_process():
    class Device:
        def __init__(self, **stats):
            self.memory_stats = lambda: stats

    full = Device(bytes_in_use=1, peak_bytes_in_use=30)
    assert memory([Device(bytes_in_use=99, peak_bytes_in_use=20), full, Device()]) == 30
    if sys.platform == "linux":
        [most] = re.findall(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert memory(jax.local_devices()) == pytest.approx(1024 * int(most), rel=0.05)


def test_the_peak_of_a_mesh(monkeypatch):
    """TPU v5e: 197 TFLOP a second each, by its maker."""
    said, mesh = [], sharding.make_mesh(fsdp=4)
    assert peak(TrainConfig(), mesh, said.append) is None
    assert said == ["train/mfu is not logged: chips.py has no peak of the device 'cpu'"]
    monkeypatch.setattr(meters, "chip_of", lambda kind: CHIPS["v5e"])
    assert peak(TrainConfig(), mesh, said.append) == 4 * 197e12 and len(said) == 1
    assert peak(TrainConfig(objective="patches"), mesh, said.append) is None and "patches" in said[1]


def test_tensorboard_gets_the_same_figures(tmp_path, clock):
    monitor = Monitor(tmp_path, steps=1, start=0, every=1)
    step(monitor, clock, 1, 7.0, 10, 100, 4)
    monitor.log(1, {"eval/accuracy": 0.5})
    (file,) = (tmp_path / "tensorboard").iterdir()
    written = file.read_bytes()  # at once, not when the run ends
    assert b"train/loss" in written and b"train/tokens_per_s" in written and b"eval/accuracy" in written
    assert monitor.evaluated(1) and not monitor.evaluated(2)
    monitor.close()


def test_a_resumed_file_loses_what_is_done_again_and_what_was_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "train/loss": 3}\n{"step": 2, "train/loss": 2}\n{"step": 3, "tra')
    resumed(file, 1).close()
    assert file.read_text() == '{"step": 1, "train/loss": 3}\n'
