"""Directories that have their name only when they are complete."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

from omnifusion_jax.errors import CheckpointError

FULL = [
    os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT)
]  # tensorstore's errors say no more than these words


def unfinished(directory):
    return Path(directory).with_name(Path(directory).name + ".unfinished")


def check_free(directory):
    """Raises CheckpointError where there is a file or a directory that is not empty."""
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(
            f"{directory} exists already and is not overwritten. Remove it, or give another name."
        )


def check_space(directory, size):
    """Raises CheckpointError where `size` bytes do not fit beside `directory`."""
    parent = next(p for p in Path(directory).absolute().parents if p.is_dir())
    if (free := shutil.disk_usage(parent).free) < size:
        raise CheckpointError(
            f"{directory}: {size:,} bytes are needed, {free:,} are free on that disk. Make room, or give another one."
        )


@contextlib.contextmanager
def written_beside(directory, size=0):
    """A new directory to write `size` bytes into; it takes its name `directory` when the block ends well, and is removed when it does not.

    Raises:
      CheckpointError: something is there already, or the disk is full.
    """
    directory = Path(directory)
    check_free(directory)
    partial = unfinished(directory)
    shutil.rmtree(partial, ignore_errors=True)
    check_space(directory, size)
    partial.mkdir(parents=True)
    try:
        yield partial
        check_free(directory)  # still: it may have taken hours
        partial.replace(directory)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if any(said in str(error) for said in FULL):
            needed = f" {size:,} bytes are needed." if size else ""
            raise CheckpointError(
                f"{directory}: the disk became full while it was written, and nothing was kept.{needed}"
            ) from error
        raise
