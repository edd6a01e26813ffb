"""Makes samples ahead of their use, in threads or worker processes, and has them put into batches.

A sample stays with the worker that made it until its place in a batch is known. Then the worker writes it
there, into memory that it shares with this process: pixels pass through no pipe, and this process copies
none.
"""

import collections
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import NamedTuple, Self

from omnifusion_jax.batch import Batch, Outline, Sample, Tile, arrange, blank, outline, put, size
from omnifusion_jax.data.worker import Worker, WorkerEnded, pack

THREADS = 2  # when there are no worker processes
PORTION = 4  # messages that a worker is sent before it has answered the first
# Seconds that a thread is given to end. One that is stuck, for example in a file on a dead network share,
# ends with this process.
PATIENCE = 1.0


def alone(thing):
    """The `gather` of a single host."""
    return [thing]


class BadSample(NamedTuple):
    """Stands for a record that cannot be used."""

    problem: str
    reason: str  # as in errors.DataError


class Readers:
    """Samples under numbers of the caller: asked for, looked at, and collected into a batch or dropped.

    An exception of `read` is raised where its sample is looked at; one from a worker process becomes a
    RuntimeError that holds its traceback. `close` ends all threads and processes and may be called more than
    once. It is also called when nothing refers to the Readers any more, and before Python exits.

    Args:
      read: gives the Samples of the record with an index, one for each of its rows, or a BadSample. It is
        pickled for worker processes.
      tiles: as in batch.collate.
      name: gives the name of the record with an index, for messages.
      processes: number of worker processes; with 0 the work is done in threads.
    """

    def __init__(
        self,
        read: Callable[[int], Sequence[Sample] | BadSample],
        tiles: Mapping[str, Tile],
        name: Callable[[int], str],
        processes: int,
    ):
        self.tiles, self.found = tiles, {}  # {n: (its maker, its outlines or their future)}
        if processes:
            pickled = pack(Shelf(read, tiles))
            workers = [Worker(pickled) for _ in range(processes)]
        else:
            workers = [Here(Shelf(read, tiles)) for _ in range(THREADS)]
        self.makers = [Maker(worker, name) for worker in workers]
        self.close = weakref.finalize(self, end, self.makers)

    def ask(self, n: int, index: int) -> None:
        """Has the record with an index read, under the number `n`, after those asked for before."""
        maker = min(self.makers, key=lambda maker: maker.load)
        self.found[n] = maker, maker.ask("make", n, index)

    def look(self, n: int) -> list[Outline] | BadSample:
        """The outlines of the samples of number `n`, once they are made."""
        maker, found = self.found[n]
        if isinstance(found, Future):
            found = found.result()
            self.found[n] = maker, found
        return found

    def drop(self, n: int) -> None:
        """Forgets number `n`, which goes into no batch."""
        maker, _ = self.found.pop(n)
        maker.ask("drop", n)

    def collect(
        self,
        plan: Sequence[Sequence[int]],
        length: int,
        pools: int | None = None,
        usual: int = 1,
        gather: Callable = alone,
    ) -> Batch:
        """A Batch of the numbers in `plan`, which are forgotten; other arguments as in batch.collate.

        Args:
          plan: the numbers in each row; or in the rows of each example, if a record makes several.
          gather: gives what each host has given it, so that all make batches of one form.
        """
        rows = [row for records in plan for row in zip(*map(self.look, records), strict=True)]
        form, places = arrange(rows, length, self.tiles, pools, usual)
        rooms = gather(form.room)
        form = form._replace(room={stream: max(room[stream] for room in rooms) for stream in form.room})
        jobs, rest = collections.defaultdict(list), iter(places)
        for records in plan:
            of_records = zip(*[next(rest) for _ in self.look(records[0])], strict=True)
            for n, places_of_record in zip(records, of_records, strict=True):
                jobs[self.found.pop(n)[0]].append((n, places_of_record))
        memory = Memory(size(form, self.tiles))
        try:
            done = [maker.ask("put", memory, form, job, urgent=True) for maker, job in jobs.items()]
            for future in done:
                future.result()
        finally:
            memory.close()
        batch = blank(form, self.tiles, memory.map)
        batch.items[:] = [sum(sample.items for sample in row) for row in rows]
        return batch


class Shelf:
    """What a worker runs: it makes samples, and keeps them until they are put into a batch."""

    def __init__(self, read, tiles):
        self.read, self.tiles, self.made = read, tiles, {}

    def __call__(self, message):
        what, *arguments = message
        return getattr(self, what)(*arguments)

    def make(self, n, index):
        made = self.read(index)
        if isinstance(made, BadSample):
            return made
        self.made[n] = made
        return list(map(outline, made))

    def put(self, memory, form, jobs):
        batch = blank(form, self.tiles, memory.map)
        for n, places in jobs:
            for sample, place in zip(self.made.pop(n), places, strict=True):
                put(batch, sample, place, self.tiles)

    def drop(self, n):
        self.made.pop(n, None)  # a bad sample was never kept


class Here:
    """Does in this process what a Worker does in another."""

    def __init__(self, function):
        self.function, self.arguments = function, collections.deque()

    def send(self, argument):
        self.arguments.append(argument)

    def receive(self):
        return self.function(self.arguments.popleft())

    def end(self):
        """It ends with its thread."""

    close = end


class Maker:
    """A thread that sends messages to one worker, and gives its answers to those who asked."""

    def __init__(self, worker, name):
        self.worker, self.name = worker, name
        self.waiting, self.sent = collections.deque(), collections.deque()  # (message, future)
        self.changed, self.ended = threading.Condition(), None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    @property
    def load(self) -> int:
        """Messages without an answer."""
        return len(self.waiting) + len(self.sent)

    def ask(self, *message, urgent: bool = False) -> Future:
        """The future answer of the worker; an urgent message goes before those that are not sent yet."""
        future = Future()
        with self.changed:
            if self.ended:
                future.set_exception(self.ended)
                return future
            (self.waiting.appendleft if urgent else self.waiting.append)((message, future))
            self.changed.notify()
        return future

    def run(self):
        try:
            while self.fill():
                try:
                    answer = self.worker.receive()
                except WorkerEnded:
                    raise
                except Exception as error:  # it is raised where the answer is asked for
                    self.answer(Future.set_exception, error)
                else:
                    self.answer(Future.set_result, answer)
        except WorkerEnded as error:
            what, *arguments = self.sent[0][0] if self.sent else [""]
            reading = f". It was reading {self.name(arguments[1])}" if what == "make" else ""
            self.fail(WorkerEnded(f"{error}{reading}"))

    def answer(self, give, answer):
        """Gives an answer to whoever asked the first message, unless it was given up."""
        _, future = self.sent.popleft()
        if not future.done():
            give(future, answer)

    def fill(self):
        """Sends messages until the worker has enough; False when this thread is to end."""
        while len(self.sent) < PORTION:
            with self.changed:
                while not (self.waiting or self.sent or self.ended):
                    self.changed.wait()
                if self.ended:
                    return False
                if not self.waiting:
                    return True
                self.sent.append(self.waiting.popleft())
            self.worker.send(self.sent[-1][0])
        return not self.ended

    def fail(self, error):
        """Ends the thread; whoever waits or asks later gets `error`."""
        with self.changed:
            self.ended = self.ended or error
            unanswered = [*self.sent, *self.waiting]
            self.waiting.clear()
            self.changed.notify()
        for _, future in unanswered:
            if not future.done():
                future.set_exception(self.ended)


def end(makers):
    """Ends all threads and processes of Readers."""
    for maker in makers:
        maker.fail(CancelledError())
        maker.worker.end()
    until = time.monotonic() + PATIENCE
    for maker in makers:
        # the garbage collector may call this in any thread, and none can join itself
        if maker.thread is not threading.current_thread():
            maker.thread.join(max(0.0, until - time.monotonic()))
        maker.worker.close()


class Memory:
    """Zeros that worker processes can write into; a pickled one is the same memory in another process.

    On Linux they have no name and take no room in /dev/shm, and are gone when nobody refers to them, however
    a process ends.
    """

    def __init__(self, size: int):
        self.named = not hasattr(os, "memfd_create")
        if self.named:
            self.file, self.path = tempfile.mkstemp()
        else:
            self.file = os.memfd_create("batch")
            self.path = f"/proc/{os.getpid()}/fd/{self.file}"
        os.ftruncate(self.file, size)
        self.map = mmap.mmap(self.file, size)

    def close(self) -> None:
        """No other process can open the memory any more; those that did keep it."""
        os.close(self.file)
        if self.named:
            os.unlink(self.path)

    def __reduce__(self):
        return Memory.opened, (self.path, len(self.map))

    @classmethod
    def opened(cls, path: str, size: int) -> Self:
        memory = cls.__new__(cls)
        with open(path, "r+b") as file:
            memory.map = mmap.mmap(file.fileno(), size)
        return memory
