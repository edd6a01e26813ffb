"""A file of answers with its header, which one process at a time may write."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from omnifusion_jax.data.prepared.disk import complete, locked, writing
from omnifusion_jax.jobs import header
from omnifusion_jax.jobs.requests import Requests
from omnifusion_jax.jobs.rows import Rows, read_rows

SAVED = 1.0  # seconds between two writings of the header, at least


class Output:
    """What an earlier run left of a file of answers, and what is added to it.

    Attributes:
      rows: all Rows of the file.
    """

    def __init__(self, target: Path, made: dict, requests: Requests, rows: Rows):
        self.target, self.made, self.requests, self.rows = target, made, requests, rows
        self.locks, self.asked, self.saved = contextlib.ExitStack(), header.Asked(requests), 0.0

    @classmethod
    @contextlib.contextmanager
    def opened(cls, target: Path, made: dict, requests: Requests, places: range) -> Iterator[Self]:
        """An Output for the requests at `places`, as long as the context lasts.

        Raises:
          DataError: the file does not belong to the requests, or was not made as `made` says.
          OmniFusionError: it cannot be written, or another process writes it.
        """
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        with contextlib.ExitStack() as locks:
            locks.enter_context(locked(target))
            rows, size = read_rows(target, requests, places, made["order"])
            output = cls(target, made, requests, rows)
            if rows:
                theirs = header.read(target)
                header.agree(target, theirs, made)
                header.check_requests(target, theirs, requests, rows)
            else:
                header.write(target, made, output.asked)
            os.truncate(target, size)  # removes a last row that was cut off
            with output.locks:
                yield output

    def replace(self, new: Mapping[int, tuple[bytes, bool]]) -> None:
        """Gives rows, by their numbers, other bytes; says whether they are errors.

        A run that is cut off leaves all of the old rows or all of the new ones.
        """
        # Until both files are written they do not match, so the header claims no answered requests.
        header.write(self.target, self.made, header.Asked(self.requests))
        beside = self.target.with_name(self.target.name + ".new")
        with writing(beside), open(self.target, "rb") as old, open(beside, "wb") as out:
            for number, row in enumerate(old):
                out.write(new[number][0] if number in new else row)
        self.locks.enter_context(locked(beside))
        complete(beside, self.target)
        for number, (_, failed) in new.items():
            self.rows.failed[number] = failed

    @contextlib.contextmanager
    def adding(self):
        """A context with a function (place, row, failed), which adds a row."""
        self.asked = header.Asked(self.requests).add(self.rows)
        with open(self.target, "ab") as out:

            def add(place: int, row: bytes, failed: bool) -> None:
                with writing(self.target):
                    out.write(row)
                    out.flush()  # what the system has survives the end of the process
                self.rows.add(place, failed)
                if time.monotonic() - self.saved > SAVED:
                    self.save()

            try:
                yield add
            finally:
                self.save()

    def save(self) -> None:
        """Writes the header."""
        header.write(self.target, self.made, self.asked.add(self.rows))
        self.saved = time.monotonic()
