"""A job that is killed at any moment loses no line and answers none twice."""

import json
import os
import time

import pytest
from conftest import FAST_COMPILATION, ROOT
from processes import begin_module, run_module

ENVIRONMENT = {**os.environ, "XLA_FLAGS": FAST_COMPILATION, "PYTHONPATH": str(ROOT)}


def lines_of(target):
    return target.read_bytes().count(b"\n") if target.exists() else 0


def killed(arguments, folder, target, lines):
    """Runs the command until it has written so many lines more, and kills it."""
    empty, until, wanted = folder / "empty", time.monotonic() + 300, lines_of(target) + lines
    empty.touch()
    child = begin_module("omnifusion_jax.generate", arguments, ROOT, ENVIRONMENT, empty, folder / "said")
    while child.is_alive() and lines_of(target) < wanted and time.monotonic() < until:
        time.sleep(0.005)
    assert child.is_alive() and lines_of(target) >= wanted, (folder / "said").read_text()
    child.kill()
    child.join()


@pytest.mark.parametrize(
    ("order", "lines"),
    [
        ("done", 60),
        pytest.param("input", 1000, marks=pytest.mark.sweep),
        pytest.param("done", 1000, marks=pytest.mark.sweep),
    ],
)
def test_a_job_that_is_killed_twice(tmp_path, order, lines):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = ["What is there? " * (1 + i % 3) for i in range(lines)]
    asked = [{"id": f"r{i}", "messages": [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    asked[7] = {"id": "r7", "images": ["nowhere.png"], "messages": asked[7]["messages"]}
    source.write_text("".join(json.dumps(line) + "\n" for line in asked))
    arguments = [f"--input={source}", f"--output={target}", f"--order={order}", "--dtype=float32"]
    arguments += ["--batch_size=4", "--generation.max_new_tokens=4"]
    if lines > 100:
        arguments.append("--num_workers=2")
    for _ in range(2):
        killed(arguments, tmp_path, target, lines // 4)
    before = lines_of(target)
    status, said = run_module("omnifusion_jax.generate", arguments, ROOT, ENVIRONMENT)
    assert status == 0, said
    assert f"{lines} answers, 1 of them errors; {before} were there already" in said
    rows = [json.loads(row) for row in target.read_text().splitlines()]
    places = [row["place"] for row in rows] if order == "done" else list(range(lines))
    assert sorted(places) == list(range(lines))
    assert [row["id"] for row in rows] == [f"r{place}" for place in places]
    assert [row["id"] for row in rows if row["finish_reason"] == "error"] == ["r7"]
    assert places != sorted(places) or order == "input"
