"""Reads every record as training would, in worker processes, and keeps some 20 bytes of each."""

import collections
import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from omnifusion_jax.batch import outline
from omnifusion_jax.config import DataConfig
from omnifusion_jax.data.omitted import TOO_LONG
from omnifusion_jax.data.pipeline import Read
from omnifusion_jax.data.readers import BadSample
from omnifusion_jax.data.reading import Reading
from omnifusion_jax.data.rows import room_of
from omnifusion_jax.data.sources import ENDLESS
from omnifusion_jax.data.sweep import Portion, Sweep
from omnifusion_jax.data_report.classes import script, size_class
from omnifusion_jax.data_report.watched import Watched

PORTION = 32  # records that a process reads at a time
EXAMPLES = 5  # kept of each problem
LONGEST = 1000  # characters of a message
ENOUGH = 1000  # records of a source without an end that are looked at
NO_TARGETS = "no_targets"  # the reason of samples that training takes and learns nothing from

# What became of a record. Training takes USABLE and UNTAUGHT ones; only USABLE ones are free of problems.
UNSEEN, USABLE, UNTAUGHT, LONG, BAD = range(5)

RECORD = np.dtype(
    [
        ("state", np.uint8),
        ("cut", np.bool_),  # turns were cut off
        ("tokens", np.int32),
        ("tiles", np.int32),
        ("pictures", np.int32),
        ("text", np.uint64),  # a hash of what is said
    ]
)


class Result(NamedTuple):
    """What a worker tells of a portion."""

    records: np.ndarray  # RECORD[records]
    hashes: np.ndarray  # uint64[pictures], of the usable records in their order
    counts: dict[str, collections.Counter]  # as in Found
    problems: list[tuple[int, str, str]]  # (index, reason, message)


class Problem(NamedTuple):
    """Records that cannot be used for one reason."""

    count: int
    examples: list[tuple[int, str]]  # (index, message) of the first EXAMPLES


class Found:
    """What is known so far of a set of data.

    Attributes:
      records: RECORD[n]; of a source without an end, its first ENOUGH.
      counts: {"sizes": of pictures by their `size_class`, "tiles": of pictures by their tiles, "scripts": of
        answers by their script, "unread": of records by their keys that nothing reads}, of the records that
        training takes.
      problems: {reason: Problem}.
    """

    def __init__(self, name: str, first: int, records: int, endless: bool):
        self.name, self.first, self.endless = name, first, endless
        self.records = np.zeros(records, RECORD)
        self.counts = collections.defaultdict(collections.Counter)
        self.problems: dict[str, Problem] = {}
        self.parts = {}  # {first record of a portion: hashes of its pictures}

    def add(self, portion: range, result: Result) -> None:
        start = portion.start - self.first
        self.records[start : start + len(portion)] = result.records
        self.parts[start] = result.hashes
        for name, counter in result.counts.items():
            self.counts[name].update(counter)
        for index, reason, message in result.problems:
            count, examples = self.problems.get(reason, (0, []))
            self.problems[reason] = Problem(count + 1, sorted([*examples, (index, message)])[:EXAMPLES])

    @property
    def hashes(self) -> np.ndarray:
        """uint64[pictures], in the order of the records."""
        parts = [self.parts[start] for start in sorted(self.parts)]
        return np.concatenate([np.zeros(0, np.uint64), *parts])

    @property
    def looked(self) -> int:
        """How many records were looked at."""
        return int((self.records["state"] != UNSEEN).sum())

    @property
    def places(self) -> np.ndarray:
        """int[n]: which records training takes, numbered within the set."""
        return np.flatnonzero(np.isin(self.records["state"], (USABLE, UNTAUGHT)))

    @property
    def taken(self) -> np.ndarray:
        """RECORD[n]: those that training takes."""
        return self.records[self.places]


class Gathered:
    """All that is known so far of the sets; `failed` are messages of what ended a process early."""

    def __init__(self, found: list[Found]):
        self.found, self.failed, self.lock = found, [], threading.Lock()
        self.firsts = [one.first for one in found]

    def portions(self) -> Iterator[range]:
        """Ranges of indices of the mixture, each within one set."""
        for one in self.found:
            end = one.first + len(one.records)
            yield from (range(i, min(i + PORTION, end)) for i in range(one.first, end, PORTION))

    def add(self, portion: range, result: Result) -> None:
        number = np.searchsorted(self.firsts, portion.start, side="right") - 1
        with self.lock:
            self.found[number].add(portion, result)

    @property
    def complete(self) -> bool:
        return all(one.looked == len(one.records) for one in self.found)

    @property
    def records(self) -> int:
        """How many there are to look at."""
        return sum(len(one.records) for one in self.found)


@dataclasses.dataclass
class Look:
    """Reads a portion as training reads it. It travels to worker processes."""

    read: Read
    watched: Watched
    skip_long: bool

    def __call__(self, portion: Portion) -> Result:
        result = Result(np.zeros(len(portion), RECORD), [], collections.defaultdict(collections.Counter), [])
        for record, index in zip(result.records, portion, strict=True):
            samples = self.read(index)
            if not isinstance(samples, BadSample):
                self.note(record, samples, result)
                if record["state"] == USABLE:
                    continue
                message = f"{self.watched.member.dialogue.where}: no token is a target: nothing is learned"
                samples = BadSample(message, NO_TARGETS)
            elif self.skip_long and samples.reason == TOO_LONG:
                record["state"] = LONG
                continue
            else:
                record["state"] = BAD
            result.problems.append((index, samples.reason, samples.problem[:LONGEST]))
        return result._replace(hashes=np.array(result.hashes, np.uint64), counts=dict(result.counts))

    def note(self, record, samples, result):
        """Notes a record that training takes."""
        outlines, pictures = list(map(outline, samples)), self.watched.pictures
        taught = any((sample.weights > 0).any() for sample in samples)
        dialogue = self.watched.member.dialogue
        said = repr((dialogue.turns, dialogue.rejected)).encode(errors="surrogatepass")
        record["state"] = USABLE if taught else UNTAUGHT
        record["tokens"], record["tiles"] = room_of(outlines)
        full = record["tokens"] == self.watched.layout.max_length
        # "original" cuts within a turn, and does not say so
        record["cut"] = any(one.cut for one in outlines) or (self.watched.layout.original and full)
        record["pictures"] = len(pictures)
        record["text"] = int.from_bytes(hashlib.blake2b(said, digest_size=8).digest())
        result.hashes.extend(picture.hash for picture in pictures)
        result.counts["sizes"].update(size_class(picture.width, picture.height) for picture in pictures)
        result.counts["tiles"].update(picture.tiles for picture in pictures)
        result.counts["unread"].update(dialogue.unread)
        result.counts["scripts"].update(map(script, self.watched.answers()))


def begin(data: Reading, c: DataConfig) -> tuple[Gathered, Look]:
    """A Gathered that knows nothing yet, and what finds out."""
    found = []
    for name, first, source in zip(data.source.names, data.source.first, data.source.sources, strict=False):
        endless = len(source) >= ENDLESS
        found.append(Found(name, first, ENOUGH if endless else len(source), endless))
    watched = Watched(data.prepare)
    read = Read.of(data.source, watched, data.choose)
    return Gathered(found), Look(read, watched, c.on_long == "skip")


def gather(
    data: Reading, c: DataConfig, processes: int, advance: Callable[[int], Any] = lambda records: None
) -> tuple[Gathered, Sweep]:
    """Starts to read all records; what the Sweep finds is put into the Gathered.

    Args:
      processes: that read.
      advance: is told, from several threads, how many more records are done.
    """
    gathered, look = begin(data, c)

    def add(portion, result):
        gathered.add(portion, result)
        advance(len(portion))

    def fail(portion, error):
        first, last = data.source.where(portion[0]), data.source.where(portion[-1])
        gathered.failed.append(f"{error}. It was reading {first} to {last}")

    return gathered, Sweep(look, gathered.portions(), add, fail, processes)
