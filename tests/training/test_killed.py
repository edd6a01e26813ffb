"""Runs that are killed (`kill -9`) at random moments, also while they save: they end as if nothing had been.

The environment variable `SEED` chooses other moments.
"""

import json
import os
import random
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import FAST_COMPILATION, ROOT
from killed import EVALUATES, SAVES
from processes import begin_module

SEED = int(os.environ.get("SEED", "0"))
OF_MACHINES = ("tokens_per_s", "images_per_s", "input_wait", "memory", "goodput")
TIMES = tuple(f"train/{name}" for name in OF_MACHINES)


def begin(workdir, steps):
    """Starts the run, or goes on with it."""
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(ROOT)}
    said = workdir.with_suffix(".said")
    return begin_module("killed", [str(workdir), str(steps)], ROOT / "tests", environment, os.devnull, said)


def rows(workdir):
    """The whole lines of metrics so far."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def saving(workdir):
    return any(workdir.glob("checkpoints/*tmp*"))


def kill(child, workdir, rng, while_saving):
    """Kills the run some steps after it began: while a checkpoint is half written, or whenever it may be.

    Returns whether a checkpoint was half written then.
    """
    begun, goal = len(rows(workdir)), rng.randrange(1, 6)
    until = time.monotonic() + 300
    while child.is_alive() and time.monotonic() < until:
        if len(rows(workdir)) - begun >= goal and (saving(workdir) or not while_saving):
            break
        time.sleep(0.001)
    time.sleep(rng.random() * (0.004 if while_saving else 0.02))
    assert child.is_alive(), workdir.with_suffix(".said").read_text()[-2000:]
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    return saving(workdir)


def last(workdir, steps):
    """Parameters, optimizer and place in the data after the last step, read without this library."""
    with ocp.CheckpointManager(workdir / "checkpoints", item_names=("state", "position")) as manager:
        found = manager.restore(
            steps, args=ocp.args.Composite(state=ocp.args.StandardRestore(), position=ocp.args.JsonRestore())
        )
    return found.state, found.position["data"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.sweep)])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path, kills):
    steps, rng, halves = 12 * kills, random.Random(SEED), 0
    for i in range(kills):
        child = begin(tmp_path / "killed", steps)
        halves += kill(child, tmp_path / "killed", rng, while_saving=i % 2 == 0)
    for workdir in (tmp_path / "killed", tmp_path / "whole"):
        child = begin(workdir, steps)
        child.join(600)
        assert child.exitcode == 0, workdir.with_suffix(".said").read_text()[-2000:]
    assert halves, "no kill met a save"
    killed, whole = (
        [{name: value for name, value in row.items() if name not in TIMES} for row in rows(tmp_path / name)]
        for name in ("killed", "whole")
    )
    assert killed == whole and [row["step"] for row in whole if "train/loss" in row] == [*range(1, steps + 1)]
    (state, data), (expected, expected_data) = (
        last(tmp_path / "killed", steps),
        last(tmp_path / "whole", steps),
    )
    assert data == expected_data and len(jax.tree.leaves(state)) > 30
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    kept = lambda name: sorted(int(path.name) for path in (tmp_path / name / "checkpoints").iterdir())
    figures = {row["step"]: row["eval/loss"] for row in whole if "eval/loss" in row}
    assert figures.pop(steps)  # the last evaluation comes after the last save
    best = min(figures, key=figures.get)
    saved = [n for n in range(1, steps + 1) if n % SAVES == 0 or n % EVALUATES == 0]
    assert kept("killed") == kept("whole") == sorted({best, *saved[-2:]})
