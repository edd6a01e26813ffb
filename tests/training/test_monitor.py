"""The figures of metrics.jsonl, computed by hand."""

import json
import math
import time

import pytest

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
    monitor = Monitor(tmp_path, steps=7, start=0, every=3)
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
        "train/bad_steps": 2,
        "data/skipped": 14,
    }


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
