"""The directory of a run: one run at a time, and one message where it cannot be written to."""

import contextlib
import errno
import fcntl
import os
import socket

from omnifusion_jax.errors import CheckpointError, ConfigError

# by their words: errors of tensorstore, and of Orbax's threads, carry no errno
REFUSED = [os.strerror(n) for n in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)]


@contextlib.contextmanager
def writing(what):
    """Turns a full disk or a missing permission, met while `what` is written, into a CheckpointError that says so."""
    try:
        yield
    except Exception as error:  # Orbax and tensorstore raise what they like
        reason = next((words for words in REFUSED if words in str(error)), None)
        if reason is None:
            raise
        raise CheckpointError(
            f"{what} cannot be written: {reason}. Finished checkpoints are whole. "
            "Make room, or make the place writable, and run the same command again"
        ) from error


@contextlib.contextmanager
def locked(workdir):
    """Holds WORKDIR/lock. Raises ConfigError at once where another process does.

    The operating system gives the lock back however the holder ends; the file stays and means nothing by itself. Between hosts that
    share a file system the lock holds as far as that system's do (NFS from version 4). Where there are no locks at all, that is said.
    """
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "lock").touch()
    with open(workdir / "lock", "r+") as file:  # not emptied yet: it names the holder
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().strip() or "another process"
            raise ConfigError(
                f"{workdir} is in use by {holder}. Wait for it, stop it, or give another --workdir"
            ) from None
        except OSError as error:
            print(
                f"{workdir} cannot be locked ({error.strerror}): see to it that no other run writes there",
                flush=True,
            )
        with writing(workdir):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield
