"""Where the lines of a conversation come from: a terminal with editing and memory, or a pipe."""

import atexit
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from omnifusion_jax.errors import DataError

PROMPT = "> "
REMEMBERED = 1000  # lines of earlier conversations


def piped() -> Iterator[str]:
    """Yields the lines of a file or a pipe. Raises DataError if they are no UTF-8."""
    sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale is
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"what is read is not UTF-8 ({error.reason}). Convert it", "characters") from None


def typed() -> Iterator[str]:
    """Yields the lines that are typed until Ctrl-D. Ctrl-C drops a line."""
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def remember(file: Path) -> None:
    """Gives `typed` editing, and the lines of earlier conversations, which `file` keeps for its owner alone.

    Where that cannot be, it says so, and what is typed is forgotten at the end.
    """
    try:
        import readline
    except ImportError:  # Windows, whose terminals edit and remember by themselves
        return
    readline.set_history_length(REMEMBERED)
    try:
        file = file.expanduser()
        file.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        if file.stat().st_size:  # libedit takes an empty file for a damaged one
            readline.read_history_file(file)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        print(f"{file}: {error}; --history names another file for the lines you type", file=sys.stderr)
        return
    atexit.register(readline.write_history_file, file)
