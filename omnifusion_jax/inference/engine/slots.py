"""The rows of the cache as the host sees them: who is in them, and what they hold."""

import numpy as np

from omnifusion_jax.inference.engine.programs import Rows
from omnifusion_jax.inference.engine.task import Task, shared

NOTHING = np.zeros(0, np.int64)


class Slot:
    """A row of the cache."""

    def __init__(self):
        self.task = None  # the Task that is in it
        self.held = NOTHING  # what its first columns hold, as `task.identities` numbers it
        self.left = 0  # when the last task left it

    @property
    def free(self) -> bool:
        return self.task is None


class Slots:
    """All rows. Tasks take one, or several side by side."""

    def __init__(self, count: int):
        self.all = [Slot() for _ in range(count)]
        self.leaves = 0

    def __len__(self):
        return len(self.all)

    def grow(self, count: int):
        self.all += [Slot() for _ in range(count - len(self))]

    def find(self, count: int) -> int | None:
        """The first of `count` free rows side by side, of those left longest ago; None: there are none."""
        starts = [at for at in range(len(self) - count + 1) if all(s.free for s in self.all[at : at + count])]
        return min(starts, key=lambda at: max(s.left for s in self.all[at : at + count]), default=None)

    def nearest(self, ids: np.ndarray) -> tuple[int, int]:
        """(columns, row): the row that holds most of the beginning of a prompt, and how much that is.

        The last position of a prompt does not count: it is read with the answer. Of equal rows a free one is
        better.
        """
        most = [(shared(ids[:-1], slot.held), slot.free, -at) for at, slot in enumerate(self.all)]
        columns, _, at = max(most)
        return columns, -at

    def held(self, task: Task) -> int:
        """How much of its prompt all of a task's rows hold; the last position does not count."""
        return min(shared(task.ids[: task.end], self.all[row].held) for row in task.rows)

    def fill(self, rows: range, held: np.ndarray):
        """Says what rows hold."""
        for row in rows:
            self.all[row].held = held

    def enter(self, task: Task):
        for row in task.rows:
            self.all[row].task = task

    def leave(self, task: Task):
        self.leaves += 1
        for row in task.rows:
            self.all[row].task, self.all[row].left = None, self.leaves

    def rows(self, live: list[Task], fresh: list[Task], length: int) -> Rows:
        """The Rows for a step; a row that is not decoded writes where it holds nothing."""
        read = np.array([min(len(slot.held), length - 1) for slot in self.all], np.int32)
        active, begins = np.zeros((2, len(self)), bool)
        for task in live:
            here = slice(task.rows.start, task.rows.stop)
            read[here], active[here], begins[here] = task.end, True, task in fresh
        return Rows(read, active, begins)
