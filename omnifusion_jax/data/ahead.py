"""Work that runs ahead of the code that needs its results, in threads or in worker processes.

A worker process is a bare interpreter fed through pipes. It imports what it is sent and nothing else: not
JAX, and not the main module, so that a script needs no `if __name__ == "__main__":`. It runs in its own
session, where Ctrl-C in the terminal does not reach it, and it ends when its pipe closes, however this
process ends. The worker processes of Python and of Grain do neither, and they leave semaphores and shared
memory behind when interrupted.
"""

import contextlib
import itertools
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle

from omnifusion_jax.errors import OmniFusionError

THREADS = 2  # when there are no worker processes
# Seconds that a thread is given to end. One that is stuck, for example in a file on a dead network share,
# ends with this process.
PATIENCE = 1.0
PORTION = 4  # arguments sent to a worker at a time: it has the next ones before its results are read

START = """
import signal
for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler may send them to every process: \
this one goes with the one that started it
    signal.signal(number, signal.SIG_IGN)
import os, sys
os.nice({nice})
sys.path[:] = {path!r}
from omnifusion_jax.data.ahead import serve
serve()
"""


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
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.pickled = pickled

    def send(self, argument: Any) -> None:
        """Writes one argument to the pipe.

        Sending much more than a pipe holds without receiving blocks forever.

        Raises:
          OmniFusionError: the process has ended.
        """
        with self.blamed():
            if self.pickled:  # only with the first argument: a large source takes seconds
                self.process.stdin.write(self.pickled)
                self.pickled = None
            self.process.stdin.write(pack(argument))
            self.process.stdin.flush()

    def receive(self) -> Any:
        """The next result.

        Raises:
          RuntimeError: the function raised an exception, whose traceback is in the message.
          OmniFusionError: the process has ended.
        """
        with self.blamed():
            result = pickle.load(self.process.stdout)
        if isinstance(result, Failure):
            raise RuntimeError(f"in a worker process:\n{result.traceback}")
        return result

    @contextlib.contextmanager
    def blamed(self):
        """Turns the errors of a broken pipe into an OmniFusionError that says how the process ended."""
        try:
            yield
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            status = self.process.wait()
            if status < 0:  # killed by a signal
                why = "often because memory ran out; fewer data.num_workers take less"
            else:
                why = "for what it wrote above"
            raise OmniFusionError(f"a process that reads data ended with status {status}, {why}") from None

    def close(self):
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


class Ahead:
    """An endless iterator over `function(order[start])`, `function(order[start + 1])`, ... in this order.

    An exception that `function` raises is raised when the turn of its result comes; one from a worker process
    becomes a RuntimeError that holds its traceback. `close` ends all threads and processes and may be called
    more than once. It is also called when nothing refers to the iterator any more, and before Python exits.

    Args:
      order: anything with `order[n]` for every n; it is read in threads of this process.
      processes: number of worker processes; with 0 the work is done in threads.
      ahead: how many results are made before they are asked for.
    """

    def __init__(self, function: Callable, order: Any, start: int, *, processes: int, ahead: int):
        count = processes or THREADS
        pickled = pack(function) if processes else None
        workers = [Worker(pickled) for _ in range(processes)]
        self.queues = [queue.Queue(-(-ahead // count)) for _ in range(count)]  # ahead / count, rounded up
        self.turns = itertools.cycle(self.queues)
        self.raised = None
        closed = threading.Event()
        threads = []
        for k, results in enumerate(self.queues):
            arguments = (order[n] for n in itertools.count(start + k, count))
            made = answered(workers[k], arguments) if processes else map(function, arguments)
            threads.append(threading.Thread(target=fill, args=(results, made, closed), daemon=True))
        self.close = weakref.finalize(self, shut, closed, workers, self.queues, threads)
        for thread in threads:
            thread.start()

    def __next__(self):
        result = self.raised or next(self.turns).get()
        if isinstance(result, Raised):
            self.raised = result  # for later calls too: the thread that met the error has ended
            raise result.error
        return result


class Raised(NamedTuple):
    """Stands in a queue for a result whose making raised `error`."""

    error: Exception


def answered(worker, arguments):
    """Yields the results of `worker` for the endless `arguments`, of which it is sent a portion ahead."""
    portions = iter(lambda: list(itertools.islice(arguments, PORTION)), [])
    for argument in next(portions):
        worker.send(argument)
    for portion in portions:
        for argument in portion:
            worker.send(argument)
        for _ in range(PORTION):
            yield worker.receive()


def fill(results, made, closed):
    """A thread's work: moves what `made` yields into the queue `results`, waiting while that is full."""
    try:
        for result in made:
            results.put(result)
            if closed.is_set():
                return
    except Exception as error:  # it is raised where the result is asked for
        results.put(Raised(error))


def shut(closed, workers, queues, threads):
    """Ends all threads and processes of an Ahead."""
    closed.set()
    for worker in workers:
        worker.process.kill()
    until = time.monotonic() + PATIENCE
    for results, thread in zip(queues, threads, strict=True):
        if thread is threading.current_thread():
            continue  # the garbage collector may call this in any thread, and none can join itself
        while thread.is_alive() and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                while True:
                    results.get_nowait()  # makes room: the thread may wait for it
            thread.join(0.01)
    for worker in workers:
        worker.close()
