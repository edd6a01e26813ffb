"""Worker processes.

A worker process is a bare interpreter fed through pipes. It imports what it is sent and nothing else: not
JAX, and not the main module, so that a script needs no `if __name__ == "__main__":`. It runs in its own
session, where Ctrl-C in the terminal does not reach it, and it ends when its pipe closes, however this
process ends. The worker processes of Python and of Grain do neither, and they leave semaphores and shared
memory behind when interrupted.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import traceback
from typing import Any, NamedTuple

import cloudpickle

from omnifusion_jax.errors import OmniFusionError

START = """
import signal
for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler may send them to every process: \
this one goes with the one that started it
    signal.signal(number, signal.SIG_IGN)
import os, sys
os.nice({nice})
sys.path[:] = {path!r}
from omnifusion_jax.data.worker import serve
serve()
"""
# For glibc: up to 128 MB that pictures took stay with the process for the next ones, as memory that is fresh
# from the system takes a tenth of the time in which a picture is read and resized. Other systems ignore it.
MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 27), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}


class WorkerEnded(OmniFusionError):
    """A worker process has ended before its work was done."""


class Failure(NamedTuple):
    """What a worker sends in place of a result when its function raised an exception."""

    traceback: str


class Worker:
    """A process that calls one function, `pickled` by `pack`, on every argument that it is sent.

    Its results come back in the order of the arguments.
    """

    def __init__(self, pickled: bytes, nice: int = 0):
        command = [sys.executable, "-c", START.format(nice=nice, path=sys.path)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            env=MEMORY | os.environ,
        )
        self.pickled = pickled

    def send(self, argument: Any) -> None:
        """Writes one argument to the pipe.

        Sending much more than a pipe holds without receiving blocks forever.

        Raises:
          WorkerEnded: the process has ended.
        """
        with self.blamed():
            if self.pickled:  # only with the first argument: a large source takes seconds
                self.process.stdin.write(self.pickled)
                self.pickled = None
            self.process.stdin.write(pickle.dumps(argument, protocol=5))
            self.process.stdin.flush()

    def receive(self) -> Any:
        """The next result.

        Raises:
          RuntimeError: the function raised an exception, whose traceback is in the message.
          WorkerEnded: the process has ended.
        """
        with self.blamed():
            result = pickle.load(self.process.stdout)
        if isinstance(result, Failure):
            raise RuntimeError(f"in a worker process:\n{result.traceback}")
        return result

    @contextlib.contextmanager
    def blamed(self):
        """Turns the errors of a broken pipe into a WorkerEnded that says how the process ended."""
        try:
            yield
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            status = self.process.wait()
            if status < 0:  # killed by a signal
                why = "often because memory ran out; fewer data.num_workers take less"
            else:
                why = "for what it wrote above"
            raise WorkerEnded(f"a process that reads data ended with status {status}, {why}") from None

    def end(self) -> None:
        """Kills the process; whoever waits for a result gets WorkerEnded."""
        self.process.kill()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # data that can no longer be sent
                pipe.close()


def pack(thing: Any) -> bytes:
    return cloudpickle.dumps(thing)  # unlike pickle, it takes functions and classes of the main module too


def serve():
    """The main loop of a worker process, which runs until its input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # printed text goes to stderr, so that it does not mix with the answers
    with contextlib.suppress(EOFError, pickle.UnpicklingError):
        function = pickle.load(requests)
        while True:
            argument = pickle.load(requests)
            try:
                answer = pickle.dumps(function(argument), protocol=5)
            except Exception:
                answer = pickle.dumps(Failure(traceback.format_exc()))
            try:
                answers.write(answer)
                answers.flush()
            except BrokenPipeError:
                os._exit(0)  # nobody is left to read the answer
