"""Results that are made before they are asked for, in order, by worker processes that may die."""

import collections
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from omnifusion_jax.data.worker import Worker, WorkerEnded, pack

THREADS = 2  # when there are no worker processes


def ahead(
    function: Callable[[Sequence[int]], list],
    portions: Iterable[Sequence[int]],
    workers: int,
    depth: int,
    died: Callable[[int, WorkerEnded], Any],
) -> Iterator[tuple[int, Any]]:
    """Yields (i, result) for each number of the portions, in order.

    Closing it ends all threads and processes.

    Args:
      function: gives a result for each number of a portion. It is pickled for the processes.
      workers: number of worker processes; with 0 the work is done in threads.
      depth: portions that are made, or being made, before they are asked for.
      died: gives the result of a number at which a worker process ended. The others of its portion are made
        again, each alone, by a new process.
    """
    hands = [Hand(pack(function), died) for _ in range(workers)] or [function] * THREADS
    free = queue.SimpleQueue()
    for hand in hands:
        free.put(hand)

    def make(portion):
        hand = free.get()
        try:
            return hand(portion)
        finally:
            free.put(hand)

    pool, waiting = ThreadPoolExecutor(len(hands)), collections.deque()
    try:
        for portion in portions:
            waiting.append((portion, pool.submit(make, portion)))
            if len(waiting) > depth:
                yield from given(*waiting.popleft())
        while waiting:
            yield from given(*waiting.popleft())
    finally:
        for hand in hands[:workers]:
            hand.end()
        pool.shutdown(wait=bool(workers), cancel_futures=True)
        for hand in hands[:workers]:
            hand.close()


def given(portion, future):
    return zip(portion, future.result(), strict=True)


class Hand:
    """Calls a function, `pickled` by `pack`, in a worker process, and starts another when that dies."""

    def __init__(self, pickled: bytes, died: Callable[[int, WorkerEnded], Any]):
        self.pickled, self.died = pickled, died
        self.worker, self.closed, self.lock = None, False, threading.Lock()

    def __call__(self, portion: Sequence[int]) -> list:
        try:
            return self.ask(portion)
        except WorkerEnded as error:
            if self.closed:
                raise
            if len(portion) == 1:
                return [self.died(portion[0], error)]
            return [result for i in portion for result in self([i])]

    def ask(self, portion):
        with self.lock:
            if self.closed:
                raise WorkerEnded("the job has ended")
            self.worker = self.worker or Worker(self.pickled)
        try:
            self.worker.send(portion)
            return self.worker.receive()
        except WorkerEnded:
            self.worker.close()
            self.worker = None
            raise

    def end(self):
        """Kills the process; a thread that waits for it gets WorkerEnded."""
        with self.lock:
            self.closed = True
            if self.worker is not None:
                self.worker.end()

    def close(self):
        """To be called when no thread waits any more."""
        if self.worker is not None:
            self.worker.close()
