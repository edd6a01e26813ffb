"""Checks a whole data set without decoding pictures: lays out every record with the sizes that headers give.

It does so in worker processes, so that a run compiles and even trains meanwhile.
"""

import dataclasses
import re
import threading
from collections.abc import Callable
from typing import Any

from omnifusion_jax.data.omitted import TOO_LONG
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.data.sweep import Sweep
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

    def fail(self, error: Exception) -> None:
        """Notes an error of the check, not of the data.

        Training can do without the check, but must not take it for complete.
        """
        self.failed = str(error)

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
        report = self.report = Report(len(source), skip_long)
        starts = range(0, report.records, PORTION)
        self.sweep = Sweep(
            Problems(source, prepare.outlined()),
            (range(start, min(start + PORTION, report.records)) for start in starts),
            lambda portion, problems: report.add(len(portion), problems),
            lambda portion, error: report.fail(error),
            processes,
            NICE,
        )
        self.close, self.threads = self.sweep.close, self.sweep.threads

    def wait(self, seconds: float | None = None) -> Report:
        """The Report, once all records are checked or `seconds` have passed."""
        self.sweep.wait(seconds)
        return self.report


def start_check(source: Any, prepare: Any, processes: int, skip_long: bool = False) -> Check | None:
    """Starts a Check of the whole source; None for synthetic pictures, which have no end."""
    return Check(source, prepare, max(1, processes), skip_long) if len(source) < ENDLESS else None
