"""The memory of a job hardly grows with the number of its lines."""

import json
import tracemalloc

import pytest
import tiny

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.sources import JsonSource
from omnifusion_jax.inference.model import Answer
from omnifusion_jax.jobs import header
from omnifusion_jax.jobs.asking import Asking
from omnifusion_jax.jobs.output import Output
from omnifusion_jax.jobs.progress import JobProgress
from omnifusion_jax.jobs.requests import Requests
from omnifusion_jax.jobs.rows import row

MADE = {"order": "done", "part": None}


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    return Prepare.of(tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer")), tiny.config(), 256)


def written(folder, count, prepare):
    """So many Requests, opened, and a file of the answers to all but the last."""
    source, target = folder / f"{count}.jsonl", folder / f"{count}.out"
    with open(source, "w") as asked, open(target, "wb") as answers:
        for i in range(count):
            talk = {"id": f"r{i}", "messages": [{"role": "user", "content": "What is in the picture?"}]}
            asked.write(json.dumps(talk) + "\n")
            if i < count - 1:
                answers.write(row(i, f"r{i}", Answer("a cat", [1, 2, 3]), "done")[0])
    return Requests(JsonSource(source), prepare, 4), target


def peak(work):
    """The most bytes that `work` holds at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def go_on(requests, target):
    """Reads what is there, as a job does that was cut off before its last line."""
    header.write(target, MADE, header.Asked(requests))
    with Output.opened(target, MADE, requests, range(len(requests))) as output:
        assert list(output.rows.left()) == [len(requests) - 1]
        with output.adding() as write:
            write(len(requests) - 1, b"{}\n", False)


def ask(requests):
    """Makes every request ready, as a job does while the model answers."""
    asking, asked = Asking(None, requests, GenerationConfig(max_new_tokens=4), 2, 0, JobProgress()), {}
    for number, _ in enumerate(asking.questions(range(len(requests)), asked)):
        del asked[number]
    assert number == len(requests) - 1


@pytest.mark.parametrize("lines", [10_000, pytest.param(200_000, marks=pytest.mark.sweep)])
def test_a_line_takes_a_few_bytes_when_a_job_goes_on(tmp_path, prepare, lines):
    few, many = written(tmp_path, 1000, prepare), written(tmp_path, lines, prepare)
    more = peak(lambda: go_on(*many)) - peak(lambda: go_on(*few))
    print(f"{lines:,} lines: {more / lines:.1f} bytes each")
    assert more < 16 * lines  # with its answer it is 150 bytes on the disk, and far more as objects


@pytest.mark.parametrize("lines", [2_000, pytest.param(200_000, marks=pytest.mark.sweep)])
def test_what_is_made_ready_is_no_more_than_some_windows(tmp_path, prepare, lines):
    few, many = written(tmp_path, 500, prepare)[0], written(tmp_path, lines, prepare)[0]
    ask(few)  # what is imported and kept at the first call
    more = -peak(lambda: ask(few)) + peak(lambda: ask(many))
    print(f"{lines:,} lines: {more:,} bytes more")
    assert more < 100_000  # a hundred lines that are ready
