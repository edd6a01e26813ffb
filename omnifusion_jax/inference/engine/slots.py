"""The slots of the cache as the host sees them: who is in them, and what they hold."""

import numpy as np

from omnifusion_jax.inference.engine.programs import Rows
from omnifusion_jax.inference.engine.task import Task, shared

NOTHING = np.zeros(0, np.int64)


class Slot:
    """A place for a prompt and its answer."""

    def __init__(self):
        self.task = None  # the Task that is in it
        self.held = NOTHING  # the positions that were read into it, as `task.identities` numbers them
        self.end = 0  # positions that may be written; those long before are lost in a ring
        self.left = 0  # when the last task left it

    @property
    def free(self) -> bool:
        return self.task is None


class Slots:
    """All slots. Tasks take one, or several side by side."""

    def __init__(self, beams: int, most: int, spare: int):
        """They have `beams` rows each.

        They have `most` columns at most, which are the window, `spare` ones, and a piece of a prompt.
        """
        self.beams, self.most, self.spare = beams, most, spare
        self.all = []
        self.leaves = 0

    def __len__(self):
        return len(self.all)

    def grow(self, count: int):
        self.all += [Slot() for _ in range(count - len(self))]

    def find(self, count: int) -> int | None:
        """The first of `count` free slots side by side, of those left longest ago; None: there are none."""
        starts = [at for at in range(len(self) - count + 1) if all(s.free for s in self.all[at : at + count])]
        return min(starts, key=lambda at: max(s.left for s in self.all[at : at + count]), default=None)

    def nearest(self, ids: np.ndarray) -> tuple[int, int]:
        """(columns, slot): the slot that holds most of the beginning of a prompt, and how much that is.

        The last position of a prompt does not count: it is read with the answer. Of equal slots a free one is
        better.
        """
        most = [(self.begun(slot, ids[:-1]), slot.free, -at) for at, slot in enumerate(self.all)]
        columns, _, at = max(most)
        return columns, -at

    def held(self, task: Task) -> int:
        """How much of its prompt all of a task's slots hold; the last position does not count."""
        return min(self.begun(self.all[at], task.ids[: task.end]) for at in task.slots)

    def begun(self, slot: Slot, ids: np.ndarray) -> int:
        """How many positions of a prompt a slot has read, if what the next one sees is not lost."""
        columns = shared(ids, slot.held)
        return columns if slot.end <= self.most or columns >= slot.end - self.spare else 0

    def fill(self, slots: range, held: np.ndarray):
        """Says what slots hold."""
        for slot in self.all[slots.start : slots.stop]:
            # one more, which is written when others are decoded
            slot.held, slot.end = held, max(slot.end if len(held) else 0, len(held) + 1)

    def copy(self, source: int, target: int):
        """Says that a slot holds what another one does."""
        self.all[target].held, self.all[target].end = self.all[source].held, self.all[source].end

    def enter(self, task: Task):
        for slot in self.all[task.slots.start : task.slots.stop]:
            slot.task, slot.end = task, max(slot.end, task.length + 1)  # others may be let in before it ends

    def leave(self, task: Task):
        self.leaves += 1
        for slot in self.all[task.slots.start : task.slots.stop]:
            slot.task, slot.left = None, self.leaves

    def rows(self, live: list[Task], fresh: list[Task], length: int) -> Rows:
        """The Rows for a step; a slot that is not decoded writes where it holds nothing."""
        read = np.array([min(len(slot.held), length - 1) for slot in self.all], np.int32)
        active, begins = np.zeros((2, len(self) * self.beams), bool)
        for task in live:
            read[task.slots.start : task.slots.stop] = task.end
            active[task.rows], begins[task.rows] = True, task in fresh
        return Rows(read, active, begins)
