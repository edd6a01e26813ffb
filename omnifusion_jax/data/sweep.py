"""Goes through a source in worker processes, a portion of its indices at a time."""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from omnifusion_jax.data.readers import PATIENCE
from omnifusion_jax.data.worker import Worker, pack

Portion = Sequence[int]  # indices that a process is given at a time


class Sweep:
    """Has a function called on portions of indices in the background, by processes that share them.

    `close` ends it and may be called more than once. It is also called when nothing refers to the Sweep any
    more, and before Python exits.

    Args:
      function: gives the result of a portion. It is pickled for the processes.
      add: called as add(portion, result), from several threads.
      fail: called as fail(portion, error) for an error of the function, or the end of a process, before its
        time. The other processes go on.
      nice: how much less the processes matter than others.
    """

    def __init__(
        self,
        function: Callable[[Portion], Any],
        portions: Iterable[Portion],
        add: Callable[[Portion, Any], None],
        fail: Callable[[Portion, Exception], None],
        processes: int = 1,
        nice: int = 0,
    ):
        pickled, closed, shared = pack(function), threading.Event(), Shared(portions)
        workers = [Worker(pickled, nice) for _ in range(processes)]
        threads = [
            threading.Thread(target=work, args=(worker, shared, add, fail, closed), daemon=True)
            for worker in workers
        ]
        self.threads = threads
        self.close = weakref.finalize(self, end, closed, workers, threads)
        for thread in threads:
            thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Returns when all is done, or `seconds` have passed."""
        until = None if seconds is None else time.monotonic() + seconds
        for thread in self.threads:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))


class Shared:
    """An iterator that several threads share."""

    def __init__(self, items):
        self.items, self.lock = iter(items), threading.Lock()

    def __iter__(self):
        return self

    def __next__(self):
        with self.lock:
            return next(self.items)


def work(worker, portions, add, fail, closed):
    """A thread's work: gives one process portions until none is left."""
    with contextlib.closing(worker):
        for portion in portions:
            try:
                worker.send(portion)
                add(portion, worker.receive())
            except Exception as error:
                if not closed.is_set():
                    fail(portion, error)
                return


def end(closed, workers, threads):
    """Ends all threads and processes of a Sweep."""
    closed.set()
    for worker in workers:
        worker.end()
    until = time.monotonic() + PATIENCE
    for thread in threads:
        # the garbage collector may call this in any thread, and none can join itself
        if thread is not threading.current_thread():
            thread.join(max(0.0, until - time.monotonic()))
