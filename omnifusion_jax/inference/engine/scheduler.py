"""Who is in the slots, and what runs next.

A turn lets requests in where there is room, reads a piece of their prompts, chooses tokens for all that are
read, and lets those out that are done. Nothing here depends on time or threads: hosts that are asked the same
take the same turns.
"""

import collections
import dataclasses

import jax
import numpy as np

from omnifusion_jax.config import check
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference import options as opt
from omnifusion_jax.inference.engine.device import Device
from omnifusion_jax.inference.engine.programs import Chunk
from omnifusion_jax.inference.engine.sizes import Piece, fitting, most, parts, piece, together
from omnifusion_jax.inference.engine.slots import NOTHING, Slots
from omnifusion_jax.inference.engine.task import Task, shared

WORTH = 32  # columns from which on it is better to copy what another slot holds than to read it again
BROKEN = (
    "the model's scores are not finite numbers. Its weights are damaged, or too large for {dtype}: "
    "convert them again, or load them with another dtype"
)
STUCK = (
    "no token may follow the first {length}: what generation bans, suppresses or forces leaves none. "
    "Ask for less of it"
)


class Scheduler:
    """Answers Tasks, each in slots of its own."""

    def __init__(self, model, sizes: opt.Sizes, counts, lengths, chunks, burst: int, cache: str | None):
        """Numbers of slots, their lengths and pieces of prompts are each from small to large.

        `burst`: tokens that are chosen between two turns while nobody waits for any of them; `cache`: the
        dtype of the cache.
        """
        ring = most(model.config.decoder.window, chunks)
        self.device, self.tokenizer = Device(model, sizes, cache, ring), model.tokenizer
        ways = self.device.ways
        self.counts = tuple(dict.fromkeys(-(-count // ways) * ways for count in counts))
        self.lengths, self.chunks, self.burst = lengths, chunks, burst
        self.waiting = collections.deque()
        self.more = False  # others come as soon as somebody leaves
        self.reset()

    def reset(self):
        """Forgets what is on the device, and all that were in it."""
        self.device.reset()
        self.slots = self.empty()
        self.reading, self.live = [], []
        self.fresh = []  # those of the live that have no token yet
        self.flying = collections.deque()  # (Report that the device may still work on, whom it is about)

    def empty(self) -> Slots:
        return Slots(self.device.sizes.beams, self.device.most, self.chunks[-1])

    @property
    def tasks(self) -> list[Task]:
        return [*self.waiting, *self.reading, *self.live]

    def turn(self):
        with self.device.spread():
            for task in [task for task in self.tasks if task.progress.cancelled]:
                self.drop(task, "cancelled")
            stepping = bool(self.live)
            while self.admit() or self.reading:
                self.read()
                if stepping:
                    break  # whoever is being answered goes on between two pieces
            if self.live:
                self.advance()
            while self.flying and not self.live:
                self.collect()

    def must_fit(self, task):
        """Raises ConfigError or DataError if a task needs programs that are not there."""
        for kind, size in dataclasses.asdict(self.device.sizes).items():
            need = getattr(task.needs, kind)
            check(need <= size, f"generation needs {kind} {need}, but the engine was warmed up for {size}")
        for tile, names in task.tiles.items():
            features = self.device.features[tile.number]
            if len(set(names)) > len(features.kept):
                raise DataError(
                    f"{task.where}: {len(set(names))} tiles of {features.name}, but the engine has room for "
                    f"{len(features.kept)}. Show fewer",
                    "too_long",
                )

    def admit(self) -> bool:
        """Lets in for whom there is room, in the order in which they came. Returns whether anybody was."""
        before = len(self.waiting)
        for task in list(self.waiting):
            if self.comes_cheaper(task):
                continue
            if not (self.make_room(task) and self.enter(task)):
                break
            self.waiting.remove(task)
        return len(self.waiting) < before

    def comes_cheaper(self, task) -> bool:
        """Whether another slot is about to hold half of the prompt, which then need not be read."""
        if self.device.ways > 1:
            return False
        held, _ = self.slots.nearest(task.ids) if len(self.slots) else (0, 0)
        coming = max(
            (shared(task.ids[: task.end], other.ids[: other.end]) for other in self.reading), default=0
        )
        return coming >= max(held + WORTH, task.end // 2)

    def make_room(self, task) -> bool:
        """Sees to it that free slots are there which are long enough; returns whether they are."""
        sizes = self.device.sizes.join(task.needs)
        if sizes != self.device.sizes and (self.reading or self.live):
            return False
        count = max(len(self.slots), self.counts[0])
        if self.slots.find(task.count) is None:
            if len(self.slots) == self.counts[-1]:
                return False
            taken = sum(not slot.free for slot in self.slots.all)
            count = max(count, fitting(self.counts, taken + sum(other.count for other in self.waiting)))
        # Answers of several beams have columns of their own.
        positions = task.length if sizes.beams == 1 else task.end + 1
        length = max(self.device.length, fitting(self.lengths, positions))
        if not self.device.resize(count, length, sizes):
            self.slots = self.empty()
        self.slots.grow(count)
        return self.slots.find(task.count) is not None

    def enter(self, task) -> bool:
        """Puts a task into slots of its own; returns False where its media find no room now."""
        held = []
        for tile, names in task.tiles.items():
            features = self.device.features[tile.number]
            if not features.hold(names, task.sample.media[features.name]):
                for other, there in held:
                    other.release(there)
                return False
            held.append((features, names))
        task.place(self.device.features)
        columns, near = self.slots.nearest(task.ids)
        own = task.count == 1 and columns >= WORTH and self.slots.all[near].free
        task.sit(near if own else self.slots.find(task.count), self.slots.beams)
        task.read = self.slots.held(task)
        if columns - task.read >= WORTH and self.device.ways == 1:
            self.copy(near, task.slots.start)
            task.read = columns
        self.slots.fill(task.slots[:1], task.ids[: task.read])
        self.slots.enter(task)
        self.device.ask(task.rows, opt.options(task.generation, self.tokenizer, self.device.sizes, task.name))
        self.reading.append(task)
        return True

    def copy(self, source: int, target: int):
        self.device.copy(source, target)
        self.slots.copy(source, target)

    def read(self):
        """Reads a piece of the prompts of some that are alike in this."""
        pieces = [
            (task, piece(task.read, task.end, self.device.length, self.chunks)) for task in self.reading
        ]
        first = pieces[0][1]
        group = [(task, p) for task, p in pieces if alike(p, first)]
        n = self.device.count
        if self.device.ways == 1:
            n = parts(len(group), together(first.size, n))
            group = group[:n]
        fresh = first.start == 0 and first.size > 0
        self.device.extend(self.chunk(group, n, first.size), fresh)
        for task, p in group:
            task.read = p.start + p.count
            self.slots.fill(task.slots if self.device.ways > 1 else task.slots[:1], task.ids[: task.read])
            if task.read == task.end:
                self.reading.remove(task)
                self.release(task)
                if self.device.ways == 1:
                    for other in task.slots[1:]:
                        self.copy(task.slots.start, other)
                self.slots.fill(task.slots, task.ids[: task.end])
                self.live.append(task)
                self.fresh.append(task)

    def chunk(self, group, n, size) -> Chunk:
        """The Chunk of `n` pieces. Where slots are spread over devices it has all, in their order."""
        spread = self.device.ways > 1
        slots, active = np.zeros(n, np.int32), np.zeros(n, bool)
        start, count = np.zeros((2, n), np.int32)
        columns = np.zeros((3, n, size + 1), np.int32)
        for i, (task, p) in enumerate(group):
            for at in task.slots if spread else [i]:
                slots[at], active[at], start[at], count[at] = task.slots.start, True, p.start, p.count
                columns[:, at, : p.count + 1] = task.columns[:, p.start : p.start + p.count + 1]
        return Chunk(None if spread else slots, active, start, count, *columns)

    def advance(self):
        """Chooses tokens for all whose prompts are read."""
        listening = any(task.progress.listening for task in self.live)
        rows = self.slots.rows(self.live, self.fresh, self.device.length)
        guided = self.guide()
        count = 1 if listening or guided or self.reading else self.burst
        report = self.device.advance(rows, count, eager=self.more or bool(self.waiting))
        self.fresh = []
        self.flying.append((report, list(self.live)))
        # A step that somebody listens to is read while the device does the next one.
        # The next step of a form waits for the token of this one.
        while len(self.flying) > (listening and not guided):
            self.collect()

    def guide(self) -> bool:
        """Says what forms allow next; returns whether there are any."""
        for task in [task for task in self.live if task.guides]:
            for row, guide in zip(task.rows, task.guides, strict=True):
                self.device.allow(row, guide.mask())
            if why := next((guide.error for guide in task.guides if guide.error), ""):
                self.drop(task, f"its form cannot be followed: {why}")
        return any(task.guides for task in self.live)

    def collect(self):
        """Reads the oldest Report: hands tokens out, and lets out whose answers are finished."""
        report, tasks = self.flying.popleft()
        report, texts = jax.device_get(report), None
        for task in tasks:
            if task.progress.answer is not None:
                continue
            row, done = task.rows[0], report.done[task.rows].all()
            length = int(report.length[row])
            task.follow(report)
            tokens, heard = task.progress.tokens, task.progress.listening and len(task.rows) == 1
            if heard and not done and length == len(tokens) + 1:
                tokens.append(int(report.last[row]))
            elif report.broken[task.rows].any():
                self.drop(task, BROKEN.format(dtype=self.device.dtype))
                self.slots.fill(task.slots, NOTHING)
                for slot in task.slots:
                    self.device.clear(slot)
            elif report.stuck[task.rows].any():
                self.drop(task, STUCK.format(length=length))
            elif done or heard:
                texts = self.device.answers() if texts is None else texts
                length = int(texts.length[row]) if done else length
                found = texts.tokens[row, :length].tolist()
                if done:
                    task.finish(texts, self.tokenizer)
                    self.leave(task, self.known(task, found))
                else:
                    tokens += found[len(tokens) :]

    def known(self, task, tokens) -> np.ndarray:
        """What all the slots of a task hold when it has chosen these tokens."""
        if self.slots.beams > 1:  # what is behind the prompt has columns of its own
            return task.ids[: task.end]
        # The last token is not read. Several draws have different ones before it, but the same prompt.
        same = tokens[:-1] if task.count == 1 else []
        return np.concatenate([task.ids, np.array(same, np.int64)])

    def drop(self, task, why: str):
        """Lets a task out whose answer is an error."""
        task.fail(why)
        if task in self.waiting:
            self.waiting.remove(task)
        elif task in self.reading:
            self.reading.remove(task)
            self.release(task)
            self.slots.leave(task)
        else:
            self.leave(task, task.ids[: task.end])

    def leave(self, task, held):
        """Lets a task out of its slots, which go on holding what it leaves there."""
        self.live.remove(task)
        if task in self.fresh:
            self.fresh.remove(task)
        # The last column is where a slot writes that is not decoded.
        self.slots.fill(task.slots, held[: self.device.length - 1])
        self.slots.leave(task)

    def release(self, task):
        for tile, names in task.tiles.items():
            self.device.features[tile.number].release(names)
        task.sample = None  # its pixels are large


def alike(one: Piece, other: Piece) -> bool:
    """Whether a piece can be read with another: of its size, or at the beginning, where little is lost."""
    if (one.start == 0) != (other.start == 0):
        return False
    return one.size == other.size or (one.start == 0 and other.size // 2 < one.size <= other.size)
