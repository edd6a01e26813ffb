"""What is wrong with a data set, found without decoding a picture: every record is laid out, with the sizes that headers give.

In processes of its own, so that a run compiles and even trains meanwhile. Records go there in portions: a million of
them cost this process no second copy, and a worker is done with one portion before it gets the next.
"""

import contextlib
import dataclasses
import re
import threading
import time
import weakref

from omnifusion_jax.data.ahead import PATIENCE, Worker, pack
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.errors import OmniFusionError

PORTION = 200  # records
EXAMPLES = 3  # of each reason
NICE = 10  # training goes first


class Report:
    """How many of `records` were `checked`, how many are `bad`, and `reasons`: {reason: (count, first examples)}."""

    def __init__(self, records):
        self.records, self.checked, self.found, self.failed = records, 0, {}, None
        self.lock = threading.Lock()

    def add(self, count, problems):
        """`count` records were checked; `problems` holds (index, what is wrong) for those that cannot be used."""
        with self.lock:
            self.checked += count
            for index, problem in problems:
                number, examples = self.found.get(reason(problem), (0, []))
                self.found[reason(problem)] = number + 1, sorted([*examples, (index, problem)])[:EXAMPLES]

    @property
    def reasons(self):
        with self.lock:
            ordered = sorted(self.found.items(), key=lambda item: (-item[1][0], item[0]))
            return {
                name: (number, [problem for _, problem in examples]) for name, (number, examples) in ordered
            }

    @property
    def bad(self):
        with self.lock:
            return sum(number for number, _ in self.found.values())

    @property
    def done(self):
        return self.failed is not None or self.checked == self.records

    def __str__(self):
        whole = (
            f"{self.records:,}" if self.checked == self.records else f"{self.checked:,} of {self.records:,}"
        )
        lines = [
            f"data: {whole} records checked (text, headers of pictures), {f'{self.bad:,} cannot be used:' if self.bad else 'nothing wrong'}"
        ]
        for name, (number, examples) in self.reasons.items():
            lines += [f"  {number:,} x {name}", *(f"      {example}" for example in examples)]
        return "\n".join([*lines, f"  The check itself ended early: {self.failed}"] if self.failed else lines)


def reason(problem):
    """What a message of an error has in common with those of other records: its first sentence, without place, names and numbers."""
    unnamed = re.sub(r"""(?<!\w)("[^"]*"|'[^']*')""", '"..."', problem.rstrip(". "))
    first = re.split(r"\. (?=[A-Z])", unnamed, maxsplit=1)[0]
    return re.sub(r"\d[\d,.]*", "#", first.rsplit(": ", 1)[-1])


@dataclasses.dataclass
class Problems:
    """[(index, Dialogue)] to [(index, what is wrong)] of those that `prepare` refuses."""

    prepare: object

    def __call__(self, dialogues):
        return [
            (index, problem) for index, dialogue in dialogues if (problem := refusal(self.prepare, dialogue))
        ]


def refusal(function, argument):
    try:
        function(argument)
    except OmniFusionError as error:
        return str(error)
    return None


class Check:
    """Goes through a source in `processes` worker processes, from now on; `wait` gives the Report so far.

    Args:
      source: has a length and gives the Dialogue at an index, or raises OmniFusionError. It is read in threads of this process.
      prepare: a data.layout.Prepare; pictures are only outlined (data.pictures.ImageProcessor.outline).
    `close` ends it, and may be called again; it is also called when nothing refers to it any more, and before Python exits.
    """

    def __init__(self, source, prepare, processes=1):
        self.report, self.closed = Report(len(source)), threading.Event()
        function = pack(Problems(prepare.outlined()))
        workers = [Worker(function, NICE) for _ in range(processes)]
        portions = Portions(len(source))
        threads = [
            threading.Thread(target=work, args=(w, source, portions, self.report, self.closed), daemon=True)
            for w in workers
        ]
        self.threads = threads
        self.close = weakref.finalize(self, end, self.closed, workers, threads)
        for thread in threads:
            thread.start()

    def wait(self, seconds=None):
        """The Report, when all is checked or `seconds` have passed."""
        until = None if seconds is None else time.monotonic() + seconds
        for thread in self.threads:
            thread.join(until and max(0.0, until - time.monotonic()))
        return self.report


class Portions:
    """The ranges of indices that are still to be checked, for several threads."""

    def __init__(self, records):
        self.starts, self.records, self.lock = iter(range(0, records, PORTION)), records, threading.Lock()

    def __iter__(self):
        return self

    def __next__(self):
        with self.lock:
            start = next(self.starts)
        return range(start, min(start + PORTION, self.records))


def work(worker, source, portions, report, closed):
    """A thread's work: one worker process, portion by portion."""
    with contextlib.closing(worker):
        try:
            for portion in portions:
                dialogues, problems = [], []
                for i in portion:
                    try:
                        dialogues.append((i, source[i]))
                    except OmniFusionError as error:
                        problems.append((i, str(error)))
                worker.send(dialogues)
                report.add(len(portion), problems + worker.receive())
        except Exception as error:  # of the check, not of the data: training can do without it, but nobody shall take it for done
            if not closed.is_set():
                report.failed = str(error)


def end(closed, workers, threads):
    closed.set()
    for worker in workers:
        worker.process.kill()
    until = time.monotonic() + PATIENCE
    for thread in threads:
        if thread is not threading.current_thread():  # garbage is collected wherever it happens to be
            thread.join(max(0.0, until - time.monotonic()))


def start_check(source, prepare, processes):
    """A Check of all the source holds; None for synthetic pictures, which have no end."""
    return Check(source, prepare, max(1, processes)) if len(source) < ENDLESS else None
