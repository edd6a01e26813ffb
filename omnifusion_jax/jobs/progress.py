"""How far a job is: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from omnifusion_jax.inference.model import Answer

EVERY = 30.0  # seconds between two lines where there is no terminal


class JobProgress:
    """Counts what a job does, and says it on a console if there is one.

    Attributes:
      total: requests of the job, those included that were answered by an earlier run.
      unread: keys of requests that nothing reads.
      begun: requests that this run has read to ask them.
      answered: those of them whose answers are written.
      asked: the number of the signal that asked the job to end, or None.
    """

    def __init__(self, console: Console | None = None):
        self.console, self.bar, self.asked = console, None, None
        self.total = self.kept = self.begun = self.answered = self.tokens = 0
        self.unread = set()
        self.started = self.said = time.monotonic()

    def __enter__(self) -> Self:
        if self.console is not None and self.console.is_terminal:
            self.bar = Progress(BarColumn(), TextColumn("{task.description}"), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("")
        return self

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.stop()

    def start(self, total: int, kept: int) -> None:
        """Is told of how many requests the job is, and how many have been answered already."""
        self.total, self.kept = total, kept
        self.started = self.said = time.monotonic()

    def begin(self, unread: Iterable[str] = ()) -> None:
        """Is told of a request that was read, and of its `unread` keys, each of which it says once."""
        self.begun += 1
        new = sorted(set(unread) - self.unread)
        self.unread.update(new)
        if new and self.console is not None:
            names = ", ".join(f'"{name}"' for name in new)
            self.console.print(f"nothing reads {names} of the requests", markup=False, highlight=False)

    def advance(self, answer: Answer) -> None:
        """Is told of an Answer that is written. Raises KeyboardInterrupt after `stop`."""
        self.answered += 1
        self.tokens += len(answer.tokens)
        if self.bar is not None:
            done = self.kept + self.answered
            self.bar.update(self.task, total=self.total, completed=done, description=str(self))
        elif self.console is not None and time.monotonic() - self.said > EVERY:
            self.console.print(self, highlight=False, soft_wrap=True)
            self.said = time.monotonic()
        if self.asked is not None:
            raise KeyboardInterrupt

    def stop(self, number: int, frame=None):
        """Ends the job, as the handler of a signal: raises KeyboardInterrupt, now and after the next answer.

        One that is raised in a destructor or a callback of the garbage collector is lost.
        """
        self.asked = number
        raise KeyboardInterrupt

    @property
    def lost(self) -> int:
        """How many requests would have to be asked again if the job ended now."""
        return self.begun - self.answered

    def __str__(self):
        seconds = max(time.monotonic() - self.started, 1e-9)
        done, rate = self.kept + self.answered, self.answered / seconds
        left = timedelta(seconds=round((self.total - done) / rate)) if rate else "unknown"
        rates = f"{rate:.1f} requests/s, {self.tokens / seconds:,.0f} tokens/s"
        return f"{done:,}/{self.total:,} requests, {rates}, {left} left"
