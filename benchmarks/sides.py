"""Sides of a comparison: processes of their own that do the same work by turns, and where they do it."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version


class Side:
    """A process that `be` in it makes a side.

    Attributes:
      started: when it was started, as time.perf_counter counts.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str] = os.environ):
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *words],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, **more) -> dict:
        """What it answers to a question, once it has done what that asks for."""
        print(json.dumps({"what": what, **more}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.process.args[1:])} ended with status {self.process.wait()}")
        return json.loads(line)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def be(make: Callable[[], Mapping[str, Callable[..., dict]]]) -> None:
    """Makes this process a side: `make` gives what it can be asked, {what: function}."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is no answer
    known = make()
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(known[question.pop("what")](**question)), file=answers)


def machine(*libraries: str) -> str:
    """The processor, Python and versions of libraries, as figures are quoted with."""
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, {versions}"
