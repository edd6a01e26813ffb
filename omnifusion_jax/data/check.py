"""Checks a whole data set without decoding pictures: lays out every record with the sizes that headers give.

It does so in worker processes, so that a run compiles and even trains meanwhile.
"""

import contextlib
import dataclasses
import re
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from omnifusion_jax.data.omitted import TOO_LONG
from omnifusion_jax.data.readers import PATIENCE
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.data.worker import Worker, pack
from omnifusion_jax.errors import DataError

PORTION = 200  # records that a worker checks at a time
EXAMPLES = 3  # shown for each reason
NICE = 10  # training has priority


class Report:
    """The result so far: how many of `records` were `checked` and how many of these are `bad`, by `reasons`.

    Those that are only too long count as `too_long` instead, if `skip_long`. `failed` is None, or the message
    of the error that ended the check early.
    """

    def __init__(self, records: int, skip_long: bool = False):
        self.records, self.checked, self.found, self.failed = records, 0, {}, None
        self.skip_long, self.too_long = skip_long, 0
        self.lock = threading.Lock()

    def add(self, count: int, problems: list[tuple[int, DataError]]) -> None:
        """Adds `count` checked records; `problems` holds (index, error) for those that cannot be used."""
        with self.lock:
            self.checked += count
            for index, error in problems:
                if self.skip_long and error.reason == TOO_LONG:
                    self.too_long += 1
                    continue
                problem = str(error)
                name = reason(problem)
                number, examples = self.found.get(name, (0, []))
                self.found[name] = number + 1, sorted([*examples, (index, problem)])[:EXAMPLES]

    @property
    def reasons(self) -> dict[str, tuple[int, list[str]]]:
        """{reason: (number of records, messages of the first ones)}, the most frequent reason first."""
        with self.lock:
            ordered = sorted(self.found.items(), key=lambda item: (-item[1][0], item[0]))
            return {
                name: (number, [problem for _, problem in examples]) for name, (number, examples) in ordered
            }

    @property
    def bad(self) -> int:
        with self.lock:
            return sum(number for number, _ in self.found.values())

    @property
    def done(self) -> bool:
        return self.failed is not None or self.checked == self.records

    def __str__(self):
        everything = self.checked == self.records
        checked = f"{self.records:,}" if everything else f"{self.checked:,} of {self.records:,}"
        found = f"{self.bad:,} cannot be used:" if self.bad else "nothing wrong"
        lines = [f"data: {checked} records checked (text, headers of pictures), {found}"]
        for name, (number, examples) in self.reasons.items():
            lines += [f"  {number:,} x {name}", *(f"      {example}" for example in examples)]
        if self.too_long:
            lines.append(f"  {self.too_long:,} are too long, and left out for that (data.on_long=skip)")
        if self.failed:
            lines.append(f"  The check itself ended early: {self.failed}")
        return "\n".join(lines)


def reason(problem: str) -> str:
    """What an error message shares with those of other records.

    This is its first sentence, without the place, quoted names and numbers.
    """
    unnamed = re.sub(r"""(?<!\w)("[^"]*"|'[^']*')""", '"..."', problem.rstrip(". "))
    first = re.split(r"\. (?=[A-Z])", unnamed, maxsplit=1)[0]
    return re.sub(r"\d[\d,.]*", "#", first.rsplit(": ", 1)[-1])


@dataclasses.dataclass
class Problems:
    """Turns indices into [(index, DataError)] of the records of `source` that cannot be used."""

    source: Any
    prepare: Callable

    def __call__(self, indices):
        found = []
        for index in indices:
            try:
                self.prepare(self.source[index])
            except DataError as error:
                found.append((index, error))
        return found


class Check:
    """Checks a source in the background, in `processes` worker processes; `wait` gives the Report so far.

    `close` ends the check and may be called more than once. It is also called when nothing refers to the
    Check any more, and before Python exits.

    Args:
      source: has a length and gives the Dialogue at an index, or raises OmniFusionError. It is pickled for
        the processes.
      prepare: a data.layout.Prepare; its `outlined` form is used, which reads only the headers of pictures.
      skip_long: records that are only too long are not counted with the bad ones.
    """

    def __init__(self, source: Any, prepare: Any, processes: int = 1, skip_long: bool = False):
        self.report, self.closed = Report(len(source), skip_long), threading.Event()
        function = pack(Problems(source, prepare.outlined()))
        workers = [Worker(function, NICE) for _ in range(processes)]
        portions = Portions(len(source))
        threads = [
            threading.Thread(target=work, args=(w, portions, self.report, self.closed), daemon=True)
            for w in workers
        ]
        self.threads = threads
        self.close = weakref.finalize(self, end, self.closed, workers, threads)
        for thread in threads:
            thread.start()

    def wait(self, seconds: float | None = None) -> Report:
        """The Report, once all records are checked or `seconds` have passed."""
        until = None if seconds is None else time.monotonic() + seconds
        for thread in self.threads:
            left = None if until is None else max(0.0, until - time.monotonic())
            thread.join(left)
        return self.report


class Portions:
    """An iterator over the ranges of indices still to be checked, which several threads share."""

    def __init__(self, records):
        self.starts, self.records, self.lock = iter(range(0, records, PORTION)), records, threading.Lock()

    def __iter__(self):
        return self

    def __next__(self):
        with self.lock:
            start = next(self.starts)
        return range(start, min(start + PORTION, self.records))


def work(worker, portions, report, closed):
    """A thread's work: has one worker process check portions of the source."""
    with contextlib.closing(worker):
        try:
            for portion in portions:
                worker.send(portion)
                report.add(len(portion), worker.receive())
        except Exception as error:
            # An error of the check, not of the data. Training can do without the check, but must not take it
            # for complete.
            if not closed.is_set():
                report.failed = str(error)


def end(closed, workers, threads):
    """Ends all threads and processes of a Check."""
    closed.set()
    for worker in workers:
        worker.process.kill()
    until = time.monotonic() + PATIENCE
    for thread in threads:
        # the garbage collector may call this in any thread, and none can join itself
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))


def start_check(source: Any, prepare: Any, processes: int, skip_long: bool = False) -> Check | None:
    """Starts a Check of the whole source; None for synthetic pictures, which have no end."""
    return Check(source, prepare, max(1, processes), skip_long) if len(source) < ENDLESS else None
