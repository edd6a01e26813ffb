"""Files that are whole or not there, in a folder that one process writes."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path

from omnifusion_jax.errors import OmniFusionError


@contextlib.contextmanager
def writing(what: Path) -> Iterator[None]:
    """A context that writes: a full disk, a missing permission and the like become an OmniFusionError."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
        why = getattr(error, "strerror", None) or str(error)
        raise OmniFusionError(
            f"{what} cannot be written: {why}. What is complete is kept: make room, or make the place "
            "writable, and start the same command again"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context that no second process can enter for the same folder, however the first one ends.

    Raises OmniFusionError at once if another process is in it. A file system without locks is named.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OmniFusionError(f"{folder} is being written by another process: wait, or stop it") from None
        except OSError as error:
            print(f"{folder} cannot be locked ({error.strerror}): see to it that no other process writes it")
        yield
    finally:
        os.close(handle)


def write_json(path: Path, *lines: dict, beside: Path, indent: int | None = None) -> None:
    """Writes a file of lines of JSON, first in the folder `beside`: under its name it is whole."""
    first = beside / f"{path.name}.{os.getpid()}"
    first.write_text("".join(json.dumps(line, indent=indent) + "\n" for line in lines), encoding="utf-8")
    complete(first, path)


def complete(first: Path, path: Path) -> None:
    """Gives a file its name, when all of it is on the disk."""
    with open(first, "rb") as file:
        os.fsync(file.fileno())
    first.replace(path)
