"""Items that a thread makes before they are asked for."""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

from omnifusion_jax.data.readers import PATIENCE


class Ahead:
    """An iterator over an endless iterator, up to `depth` items of which are made in a thread of their own.

    An exception is raised when the turn of its item comes, and at every later one. `close` ends the thread
    and may be called more than once. It is also called when nothing refers to the iterator any more, and
    before Python exits.

    Args:
      release: called by `close` to end whatever the thread may wait for.
    """

    def __init__(self, items: Iterator, depth: int, release: Callable[[], None]):
        self.made, self.raised, closed = queue.Queue(depth), None, threading.Event()
        thread = threading.Thread(target=fill, args=(self.made, items, closed), daemon=True)
        self.close = weakref.finalize(self, shut, closed, release, self.made, thread)
        thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        item = self.raised or self.made.get()
        if isinstance(item, Raised):
            self.raised = item
            raise item.error
        return item


class Raised(NamedTuple):
    """Stands in the queue for an item whose making raised `error`."""

    error: Exception


def fill(made, items, closed):
    """The thread's work: moves items into the queue, waiting while that is full."""
    try:
        for item in items:
            made.put(item)
            if closed.is_set():
                return
    except Exception as error:  # it is raised where the item is asked for
        made.put(Raised(error))


def shut(closed, release, made, thread):
    """Ends the thread of an Ahead."""
    closed.set()
    release()
    if thread is threading.current_thread():
        return  # the garbage collector may call this in any thread, and none can join itself
    until = time.monotonic() + PATIENCE
    while thread.is_alive() and time.monotonic() < until:
        with contextlib.suppress(queue.Empty):
            while True:
                made.get_nowait()  # makes room: the thread may wait for it
        thread.join(0.01)
