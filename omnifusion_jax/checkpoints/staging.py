"""Directories that have their name only when they are complete."""

import contextlib
import shutil
from pathlib import Path

from omnifusion_jax.errors import CheckpointError


def unfinished(directory):
    return Path(directory).with_name(Path(directory).name + ".unfinished")


def check_free(directory):
    """Raises CheckpointError where there is a file or a directory that is not empty."""
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists already and is not overwritten. Remove it, or give another name.")


@contextlib.contextmanager
def written_beside(directory):
    """A new directory to write into; it takes its name `directory` when the block ends well, and is removed when it does not.

    Raises:
      CheckpointError: something is there already.
    """
    directory = Path(directory)
    check_free(directory)
    partial = unfinished(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
