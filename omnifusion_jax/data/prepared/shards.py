"""Writes shards of ArrayRecord files, in worker processes."""

import dataclasses
import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack

from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.prepared.disk import complete, write_json, writing
from omnifusion_jax.data.prepared.plan import Plan, whole
from omnifusion_jax.data.sources.array_record import UNFINISHED, body, open_shard, packed
from omnifusion_jax.data.sources.base import Source
from omnifusion_jax.data.worker import Worker, pack
from omnifusion_jax.errors import DataError, OmniFusionError

PORTION = 16  # records written between two steps of the progress bar
HASH = 16  # bytes


@dataclasses.dataclass
class Report:
    """What is in a shard."""

    file: str
    records: int = 0
    bytes: int = 0
    media: dict[str, int] = dataclasses.field(default_factory=dict)  # items of each stream
    # Of records, numbered as in the source: their sum is the same however they are spread over shards
    hashes: int = 0
    skipped: list[dict] = dataclasses.field(default_factory=list)  # {"index", "reason", "problem"}

    def add(self, i: int, dialogue: Dialogue) -> None:
        self.records += 1
        for media in dialogue.media:
            self.media[media.stream] = self.media.get(media.stream, 0) + 1
        said = msgpack.packb([i, body(dialogue)], unicode_errors="surrogatepass")
        self.hashes += int.from_bytes(hashlib.blake2b(said, digest_size=HASH).digest())

    def skip(self, i: int, error: DataError) -> None:
        self.skipped.append({"index": i, "reason": error.reason, "problem": error.message})


def refuse(report: Report, skip: bool) -> None:
    """Raises the DataError of the first record that a shard leaves out, unless they may be left out."""
    if report.skipped and not skip:
        first = report.skipped[0]
        advice = "--on_bad_sample=skip leaves such records out and lists them"
        raise DataError(f"{first['problem'].rstrip('.')}. {advice}", first["reason"])


@dataclasses.dataclass
class Shards:
    """Writes shards, a portion of their records at a time. It travels to worker processes."""

    source: Source
    plan: Plan
    output: Path
    skip: bool

    def __call__(self, portion: tuple[int, int, int]) -> Report | OmniFusionError | None:
        """Writes records `start` to `stop` of a shard, in their order; gives its Report after the last."""
        shard, start, stop = portion
        records = self.plan.range(shard)
        try:
            if start == records.start:
                self.begin(shard)
            for i, dialogue in self.read(range(start, stop)):
                self.add(i, dialogue)
            return self.end() if stop == records.stop else None
        except OmniFusionError as error:  # for the process that asked, as it is
            return error

    def begin(self, shard):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.report = Report(self.plan.file(shard))
        self.first = self.output / UNFINISHED / f"{self.report.file}.{os.getpid()}"
        with writing(self.first):
            self.first.touch()  # ArrayRecord says nothing of a folder that cannot be written
            self.writer = ArrayRecordWriter(str(self.first), "group_size:1")

    def read(self, numbers: range) -> Iterator[tuple[int, Dialogue | DataError]]:
        """Yields the records as they are written, or why one cannot be used."""
        for i in numbers:
            try:
                yield i, whole(self.source[i], self.plan.max_pixels)
            except DataError as error:
                yield i, error

    def add(self, i, dialogue):
        if isinstance(dialogue, DataError):
            self.report.skip(i, dialogue)
            return refuse(self.report, self.skip)
        record = packed(dialogue)
        with writing(self.first):
            self.writer.write(record)
        self.report.add(i, dialogue)

    def end(self):
        with writing(self.first):
            self.writer.close()
            if open_shard(self.first).num_records() != self.report.records:
                raise OSError("it does not read back")
            self.report.bytes = self.first.stat().st_size
            beside = self.output / UNFINISHED
            write_json(beside / f"{self.report.file}.json", dataclasses.asdict(self.report), beside=beside)
            complete(self.first, self.output / self.report.file)
        return self.report


def made(
    shards: Shards, numbers: list[int], workers: int, advance: Callable[[int], Any]
) -> Iterator[tuple[int, Report]]:
    """Yields (number of a shard, its Report) as they become complete; `advance` is told of records before.

    Raises:
      OmniFusionError: the first that a worker meets. All of them end then, as they do on Ctrl-C.
    """
    left, results = queue.SimpleQueue(), queue.SimpleQueue()
    for shard in numbers:
        left.put(shard)
    pickled = pack(shards)
    running = [Worker(pickled) for _ in range(min(workers, len(numbers)))]
    work = lambda worker: follow(worker, shards.plan, left, results, advance)
    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in running]
    try:
        for thread in threads:
            thread.start()
        for _ in numbers:
            result = results.get()
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        for worker in running:
            worker.process.kill()  # which ends the thread that waits for it
        for thread in threads:
            thread.join()
        for worker in running:
            worker.close()


def follow(worker, plan, left, results, advance):
    """A thread's work: has a worker write one shard after the other, until none are `left` or one fails."""
    try:
        while True:
            shard = left.get_nowait()
            records = plan.range(shard)
            for start in records[::PORTION]:
                stop = min(start + PORTION, records.stop)
                worker.send((shard, start, stop))
                result = worker.receive()
                if isinstance(result, OmniFusionError):
                    raise result
                advance(stop - start)
            results.put((shard, result))
    except queue.Empty:
        pass
    except Exception as error:  # it is raised where the results are read
        results.put(error)
