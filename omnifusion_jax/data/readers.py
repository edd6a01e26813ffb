"""Makes samples ahead of their use, in threads or worker processes, and has them put into batches.

A sample stays with the worker that made it until its place in a batch is known. Then the worker writes it
there, into memory that it shares with this process: pixels pass through no pipe, and this process copies
none.
"""

import collections
import ctypes
import functools
import itertools
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any, NamedTuple

from omnifusion_jax.batch import Batch, Outline, Sample, Tile, arrange, clear, outline, over, put, size
from omnifusion_jax.data.worker import Worker, WorkerEnded, pack

THREADS = 2  # when there are no worker processes
PORTION = 2  # messages that a worker is sent before it has answered the first
TOGETHER = 16  # records that a message asks for at most
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
        self.tiles = tiles
        self.maker_of, self.asked, self.outlines = {}, {}, {}  # by number; a sample is asked for or outlined
        self.makers, self.memories = [], Memories()
        for _ in range(processes or THREADS):
            now = Memory(8)
            shelf = Shelf(read, tiles, now)
            self.makers.append(Maker(Worker(pack(shelf)) if processes else Here(shelf), now, name))
        self.close = weakref.finalize(self, end, self.makers)

    def ask(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Has records read after those that were asked for before, given as (number, index)."""
        together = max(1, min(TOGETHER, len(wanted) // (2 * len(self.makers))))
        for first in range(0, len(wanted), together):
            some = wanted[first : first + together]
            maker = min(self.makers, key=lambda maker: maker.load)
            future = maker.ask("make", some, count=len(some))
            for n, _ in some:
                self.maker_of[n], self.asked[n] = maker, future

    def look(self, n: int) -> list[Outline] | BadSample:
        """The outlines of the samples of number `n`, once they are made."""
        while n not in self.outlines:
            made = self.asked[n].result()
            self.outlines |= made
            for n_made in made:
                del self.asked[n_made]
        return self.outlines[n]

    def drop(self, n: int) -> None:
        """Forgets number `n`, which goes into no batch."""
        self.look(n)
        del self.outlines[n]
        self.maker_of.pop(n).ask("drop", n)

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
        several = {len(self.look(n)) for records in plan for n in records}
        assert len(several) == 1, f"records give different numbers of rows: {several}"
        rows = [row for records in plan for row in zip(*map(self.look, records), strict=True)]
        form, places = arrange(rows, length, self.tiles, pools, usual)
        rooms = gather(form.room)
        form = form._replace(room={stream: max(room[stream] for room in rooms) for stream in form.room})
        jobs, rest = collections.defaultdict(list), iter(places)
        for records in plan:
            of_records = zip(*[next(rest) for _ in self.look(records[0])], strict=True)
            for n, places_of_record in zip(records, of_records, strict=True):
                jobs[self.maker_of.pop(n)].append((n, places_of_record))
        memory = self.memories.take(size(form, self.tiles))
        batch = over(form, self.tiles, self.memories.lent(memory))
        clear(batch, rows)
        batch.items[:] = [sum(sample.items for sample in row) for row in rows]
        done = [maker.ask("put", memory, form, job, urgent=True) for maker, job in jobs.items()]
        wait(done)  # all of them, so that no worker writes into memory that serves another batch
        for future in done:
            future.result()
        for records in plan:
            for n in records:
                del self.outlines[n]
        return batch


class Shelf:
    """What a worker runs: it makes samples, and keeps them until they are put into a batch.

    `now` is a Memory that tells which record is being read: its index and 1, or 0.
    """

    def __init__(self, read, tiles, now):
        self.read, self.tiles, self.now, self.made = read, tiles, now, {}

    def __call__(self, message):
        what, *arguments = message
        return getattr(self, what)(*arguments)

    def make(self, wanted):
        found = {}
        for n, index in wanted:
            self.now.number = index + 1
            made = self.read(index)
            if isinstance(made, BadSample):
                found[n] = made
            else:
                self.made[n] = made
                found[n] = list(map(outline, made))
        self.now.number = 0
        return found

    def put(self, memory, form, jobs):
        batch = over(form, self.tiles, memory.map)
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

    def __init__(self, worker, now, name):
        self.worker, self.now, self.name = worker, now, name
        self.load = 0  # records that were asked for and are not made
        self.waiting, self.sent = collections.deque(), collections.deque()  # (message, future)
        self.changed, self.ended = threading.Condition(), None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def ask(self, *message, urgent: bool = False, count: int = 0) -> Future:
        """The future answer of the worker; an urgent message goes before those that are not sent yet.

        `count` is the number of records that are asked for.
        """
        future = Future()
        with self.changed:
            if self.ended:
                future.set_exception(self.ended)
                return future
            self.load += count
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
            now = self.now.number
            reading = f". It was reading {self.name(now - 1)}" if now else ""
            self.fail(WorkerEnded(f"{error}{reading}"))

    def answer(self, give, answer):
        """Gives an answer to whoever asked the first message, unless it was given up."""
        (what, *arguments), future = self.sent.popleft()
        if what == "make":
            self.load -= len(arguments[0])
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
        maker.now.close()


class Memories:
    """Memory for batches, which is used again when nothing refers to a batch any more.

    Fresh pages would take as long as all that is written into them.
    """

    def __init__(self):
        self.free = []

    def take(self, size: int) -> "Memory":
        """Memory of at least `size` bytes, which holds anything."""
        while self.free:
            memory = self.free.pop()
            if len(memory.map) >= size:
                return memory
        return Memory(size)

    def lent(self, memory: "Memory") -> Any:
        """The memory as a buffer; when the last array in it is gone, it is free again."""
        buffer = (ctypes.c_char * len(memory.map)).from_buffer(memory.map)
        weakref.finalize(buffer, self.free.append, memory).atexit = False
        return buffer


class Memory:
    """Memory that worker processes can write into; a pickled one is the same memory in another process.

    At first it holds zeros. On Linux it has no name and takes no room in /dev/shm, and is gone when nobody
    refers to it, however a process ends. `close` is also called when nothing refers to the Memory.
    """

    counter = itertools.count()

    def __init__(self, size: int):
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("batch")
            path, remove = f"/proc/{os.getpid()}/fd/{file}", None
        else:
            file, path = tempfile.mkstemp()
            remove = path
        os.ftruncate(file, size)
        self.map = mmap.mmap(file, size)
        self.name = path, size, next(self.counter)  # the number of a file descriptor is used again
        self.close = weakref.finalize(self, gone, file, remove)

    @property
    def number(self) -> int:
        """The first 8 bytes."""
        return int.from_bytes(self.map[:8], "little")

    @number.setter
    def number(self, value: int):
        self.map[:8] = value.to_bytes(8, "little")

    def __reduce__(self):
        return opened, self.name


def gone(file, path):
    """No other process can open the memory of this file any more; those that did keep it."""
    os.close(file)
    if path is not None:
        os.unlink(path)


@functools.lru_cache(4)  # batches that exist at a time
def opened(path: str, size: int, number: int) -> Memory:
    """The Memory of another process. Mapping its pages for every batch anew would take milliseconds."""
    memory = Memory.__new__(Memory)
    with open(path, "r+b") as file:
        memory.map = mmap.mmap(file.fileno(), size)
    return memory
