"""The directory of a run: only one run may use it, and a failed write gives one clear message."""

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path

from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.paths import remote

# Errors of tensorstore and of Orbax's threads carry no errno, so they are recognised by their words.
REFUSED = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)]


@contextlib.contextmanager
def writing(what: Path):
    """A context that writes `what`: a full disk or a missing permission becomes a CheckpointError."""
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise many kinds
        reason = next((words for words in REFUSED if words in str(error)), None)
        if reason is None:
            raise
        raise CheckpointError(
            f"{what} cannot be written: {reason}. Finished checkpoints are whole. "
            "Make room, or make the place writable, and run the same command again"
        ) from error


@contextlib.contextmanager
def locked(workdir: Path):
    """A context that holds WORKDIR/lock.

    Raises ConfigError at once when another process holds it, or when WORKDIR is a file.

    The operating system releases the lock however the holder ends; the file stays, and means nothing by
    itself. Between hosts that share a file system the lock works if that system supports it (NFS does from
    version 4). Where there are no locks at all, as in stores (gs://...), a warning is printed.
    """
    if workdir.is_file():
        raise ConfigError(f"{workdir} is a file. Give a folder, or a new name, as --workdir")
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    unlocked = f"see to it that no other run writes there than this one ({holder})"
    if remote(workdir):
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "lock").write_text(holder)
        print(f"{workdir} cannot be locked: {unlocked}", flush=True)
        yield
        return
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "lock").touch()
    with open(workdir / "lock", "r+") as file:  # "r+" does not empty the file, which names the holder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = file.read().strip() or "another process"
            raise ConfigError(
                f"{workdir} is in use by {other}. Wait for it, stop it, or give another --workdir"
            ) from None
        except OSError as error:
            print(f"{workdir} cannot be locked ({error.strerror}): {unlocked}", flush=True)
        with writing(workdir):
            file.truncate(0)
            file.write(holder)
            file.flush()
        yield
