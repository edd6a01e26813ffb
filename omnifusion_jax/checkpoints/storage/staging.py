"""Directories that get their name only once they are complete."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.paths import located, remote, removed

# These words are all that tensorstore's errors say of a full disk.
FULL = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT)]


def unfinished(directory: str | Path) -> Path:
    """Where `directory` is written until it is complete: beside it, or in a store, in its place."""
    directory = located(directory)
    return directory if remote(directory) else directory.with_name(f"{directory.name}.unfinished")


def check_free(directory: str | Path):
    """Raises CheckpointError where `directory` is a file, or a directory that is not empty."""
    directory = located(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(
            f"{directory} exists already and is not overwritten. Remove it, or give another name."
        )


def check_space(directory: str | Path, size: int):
    """Raises CheckpointError where `size` bytes do not fit on the disk that `directory` will be on."""
    parent = next(p for p in Path(directory).absolute().parents if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise CheckpointError(
            f"{directory}: {size:,} bytes are needed, {free:,} are free on that disk. "
            "Make room, or give another one."
        )


@contextlib.contextmanager
def written_beside(directory: str | Path, size: int = 0):
    """A context that gives a new directory to write `size` bytes into.

    The new directory is renamed to `directory` when the block ends well, and removed when the block raises.

    Raises:
      CheckpointError: `directory` exists already and is not empty, or cannot be made, or the disk is full.
    """
    directory = located(directory)
    check_free(directory)
    partial = unfinished(directory)
    removed(partial)
    if partial != directory:
        check_space(directory, size)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made: {error.strerror}. Give another place") from error
    try:
        yield partial
        if partial != directory:
            check_free(directory)  # again, because writing may have taken hours
            partial.replace(directory)
    except BaseException as error:
        removed(partial)
        if any(said in str(error) for said in FULL):
            needed = f" {size:,} bytes are needed." if size else ""
            raise CheckpointError(
                f"{directory}: the disk became full while it was written, and nothing was kept.{needed}"
            ) from error
        raise
