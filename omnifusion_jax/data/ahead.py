"""Work that runs ahead of whoever asks for its results: in threads of this process, or in processes of their own.

A worker process is a bare interpreter fed through pipes. It imports what it is sent and nothing else, neither the
main module nor JAX (so a script needs no `if __name__ == "__main__":`). It has a session of its own, where no Ctrl-C
of the terminal reaches it, and ends when its pipe does, however this process ends. Worker processes of Python and of
Grain do neither, and leave semaphores and shared memory behind when they are interrupted.
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
from typing import NamedTuple

import cloudpickle

from omnifusion_jax.errors import OmniFusionError

THREADS = 2  # where there are no processes
PATIENCE = 1.0  # seconds for a thread to end; one that is stuck, as in a file of a network that is down, ends with this process
PORTION = 4  # arguments that go to a worker at a time, so that it has the next ones before its results have been read

START = """
import signal
for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler may send them to every process: this one goes with the one that started it
    signal.signal(number, signal.SIG_IGN)
import os, sys
os.nice({nice})
sys.path[:] = {path!r}
from omnifusion_jax.data.ahead import serve
serve()
"""


class Failure(NamedTuple):
    """What a worker sends instead of a result when its function raised something."""

    traceback: str


class Worker:
    """A process that calls one function, `pickled` by `pack`. What it is sent are arguments, what it gives are results, in their order."""

    def __init__(self, pickled, nice=0):
        command = [sys.executable, "-c", START.format(nice=nice, path=sys.path)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.pickled = pickled

    def send(self, argument):
        """Returns once it is on its way. Whoever sends much more than a pipe holds before it receives waits for ever."""
        with self.blamed():
            if self.pickled:  # not before it is needed: a large source takes seconds
                self.process.stdin.write(self.pickled)
                self.pickled = None
            self.process.stdin.write(pack(argument))
            self.process.stdin.flush()

    def receive(self):
        with self.blamed():
            result = pickle.load(self.process.stdout)
        if isinstance(result, Failure):
            raise RuntimeError(f"in a worker process:\n{result.traceback}")
        return result

    @contextlib.contextmanager
    def blamed(self):
        try:
            yield
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            status = self.process.wait()
            why = (
                "often because memory ran out; fewer data.num_workers take less"
                if status < 0
                else "for what it wrote above"
            )
            raise OmniFusionError(f"a process that reads data ended with status {status}, {why}") from None

    def close(self):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # what could not be sent any more
                pipe.close()


def pack(thing):
    return cloudpickle.dumps(thing)  # functions and classes of the main module too


def serve():
    """What a worker process does until its input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not come among the answers
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
                os._exit(0)  # nobody is there to answer


class Ahead:
    """An endless iterator: `function(order[start])`, `function(order[start + 1])`, ... in this order.

    Args:
      order: anything with `order[n]` for every n; read in threads of this process.
      processes: how many work on it; 0: threads.
      ahead: how many results are made before they are asked for.
    What `function` raises is raised when its turn comes; from a process it is RuntimeError with its traceback.
    `close` ends all threads and processes and may be called again; it is also called when nothing refers to the
    iterator any more, and before Python exits.
    """

    def __init__(self, function, order, start, *, processes, ahead):
        count, pickled = processes or THREADS, pack(function) if processes else None
        workers = [Worker(pickled) for _ in range(processes)]
        self.queues = [queue.Queue(-(-ahead // count)) for _ in range(count)]
        self.turns = itertools.cycle(self.queues)
        self.raised = None
        closed, threads = threading.Event(), []
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
            self.raised = result  # the thread that met it has ended
            raise result.error
        return result


class Raised(NamedTuple):
    error: Exception


def answered(worker, arguments):
    """What `worker` makes of each of the endless `arguments`."""
    portions = iter(lambda: list(itertools.islice(arguments, PORTION)), [])
    for argument in next(portions):
        worker.send(argument)
    for portion in portions:
        for argument in portion:
            worker.send(argument)
        for _ in range(PORTION):
            yield worker.receive()


def fill(results, made, closed):
    """A thread's work: from `made` to the queue `results`, which holds it up when it is full."""
    try:
        for result in made:
            results.put(result)
            if closed.is_set():
                return
    except Exception as error:  # whoever asks for the result gets it
        results.put(Raised(error))


def shut(closed, workers, queues, threads):
    closed.set()
    for worker in workers:
        worker.process.kill()
    until = time.monotonic() + PATIENCE
    for results, thread in zip(queues, threads, strict=True):
        if thread is threading.current_thread():
            continue  # garbage is collected wherever it happens to be
        while thread.is_alive() and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                while True:
                    results.get_nowait()  # so that it is not held up
            thread.join(0.01)
    for worker in workers:
        worker.close()
