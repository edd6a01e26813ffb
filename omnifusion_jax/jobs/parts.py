"""Several hosts share a file of requests: each answers a part, and the last one joins what they wrote.

The hosts do not talk to each other, so that each can fail, be started again and end by itself. What they
share is the folder of the output.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

from omnifusion_jax.data.prepared.disk import complete, writing
from omnifusion_jax.errors import DataError
from omnifusion_jax.jobs import header
from omnifusion_jax.jobs.requests import Requests
from omnifusion_jax.jobs.rows import Rows, read_rows


class Part(NamedTuple):
    """What one of several hosts answers."""

    number: int  # of the host, from 0
    of: int  # hosts

    def places(self, requests: int) -> range:
        """Those of so many requests that are its own. They are neighbours, so that files can be joined."""
        return range(requests * self.number // self.of, requests * (self.number + 1) // self.of)

    def file(self, target: Path) -> Path:
        """Where its answers are written."""
        return target.with_name(f"{target.name}.part-{self.number:05}-of-{self.of:05}")

    @property
    def all(self) -> "list[Part]":
        return [Part(number, self.of) for number in range(self.of)]


def header_of(part: Part, made: dict, requests: Requests) -> dict:
    """The header of a part's file; what is in a part depends on how many requests there are."""
    return made | {"part": [*part, len(requests)]}


def join(target: Path, made: dict, requests: Requests, part: Part) -> Rows | None:
    """Makes `target` of the files of all parts and removes them, if all of them are complete.

    Hosts that end at the same time both do it, and write the same. Returns the Rows of `target` if this host
    has made it.

    Raises:
      DataError: a part was made by another model or with other settings.
    """
    if not all(ended(one, target, made, requests) for one in part.all):
        return None
    beside = target.with_name(f"{target.name}.{os.uname().nodename}.{os.getpid()}")
    with contextlib.ExitStack() as opened:
        try:
            files = [opened.enter_context(open(one.file(target), "rb")) for one in part.all]
        except FileNotFoundError:  # another host has joined and removed them in the meantime
            return None
        with writing(target), open(beside, "wb") as out:
            for file in files:
                shutil.copyfileobj(file, out, 1 << 24)
    header.write(target, made, header.Asked(requests))  # first, or the answers could not be gone on with
    complete(beside, target)
    rows, _ = read_rows(target, requests, range(len(requests)), made["order"])
    header.write(target, made, header.Asked(requests).add(rows))
    tidy(target, part)
    return rows


def joined(target: Path, made: dict, requests: Requests, retry_errors: bool) -> Rows:
    """The Rows of a file that was joined from parts before.

    Raises:
      DataError: it does not hold all answers, or other ones, or they are to be changed.
    """
    rows, _ = read_rows(target, requests, range(len(requests)), made["order"])
    if len(rows) < len(requests):
        raise DataError(
            f"{target} holds {len(rows):,} of {len(requests):,} answers, and is of one host: go on with one, "
            "or give another output"
        )
    theirs = header.read(target)
    header.agree(target, theirs, made)
    header.check_requests(target, theirs, requests, rows)
    if retry_errors and rows.errors:
        raise DataError(f"{target} is joined from its parts: its errors are tried again by one host alone")
    return rows


def tidy(target: Path, part: Part) -> None:
    """Removes the files of all parts."""
    for one in part.all:
        for file in (one.file(target), header.beside(one.file(target))):
            file.unlink(missing_ok=True)


def ended(part, target, made, requests):
    """Whether the file of a part has all its answers."""
    file = part.file(target)
    if not file.exists() or not header.beside(file).exists():
        return False
    theirs, places = header.read(file), part.places(len(requests))
    header.agree(file, theirs, header_of(part, made, requests))
    if theirs["requests"].get("answered") != len(places):
        return False
    rows, size = read_rows(file, requests, places, made["order"])
    return len(rows) == len(places) and size == file.stat().st_size
