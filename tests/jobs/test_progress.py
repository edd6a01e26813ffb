"""What is said of a job: a line now and then where nobody watches, counts when it is stopped."""

import io
import re
import signal

import pytest
from rich.console import Console

from omnifusion_jax.inference.model import Answer
from omnifusion_jax.jobs import progress
from omnifusion_jax.jobs.progress import JobProgress

FOUR = Answer("a cat", [1, 2, 3, 4])


def answered(console, count, monkeypatch, every):
    monkeypatch.setattr(progress, "EVERY", every)
    with JobProgress(console) as told:
        told.start(1000, kept=100)
        told.started -= 60  # a minute ago
        for _ in range(count):
            told.begin()
            told.advance(FOUR)
        told.begin()
    return told


def test_lines_have_counts_rates_and_the_time_that_is_left(monkeypatch):
    out = io.StringIO()
    told = answered(Console(file=out, width=60), 300, monkeypatch, every=0)
    lines = out.getvalue().splitlines()
    assert len(lines) == 300 and told.lost == 1
    assert re.fullmatch(r"400/1,000 requests, 5\.0 requests/s, 20 tokens/s, 0:0[12]:\d\d left", lines[-1])
    out.truncate(0)
    answered(Console(file=out), 300, monkeypatch, every=30)
    assert not out.getvalue().strip("\0")


def test_a_terminal_has_a_bar(monkeypatch):
    out = io.StringIO()
    answered(Console(file=out, force_terminal=True, width=120), 300, monkeypatch, every=0)
    assert "400/1,000 requests, 5.0 requests/s" in out.getvalue() and out.getvalue().count("\n") == 1


def test_nothing_is_known_of_the_time_before_the_first_answer():
    told = JobProgress()
    told.start(10, 0)
    assert str(told).endswith("0/10 requests, 0.0 requests/s, 0 tokens/s, unknown left")


class Deaf:
    """What is raised in its destructor is lost."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_ends_a_job_wherever_it_came():
    told = JobProgress()
    before = signal.signal(signal.SIGTERM, told.stop)
    try:
        Deaf()
        told.begin()
        with pytest.raises(KeyboardInterrupt):
            told.advance(FOUR)
        assert (told.asked, told.lost) == (signal.SIGTERM, 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
