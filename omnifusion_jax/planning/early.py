"""What the compiler for TPUs has decided of a program when it begins to generate code.

That is the text of the program and the place of every buffer, all that a plan asks for. Code takes several
times as long. The compiler writes both to files as it goes, and is left behind.
"""

import atexit
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

TEXT, BUFFERS = "after_optimizations.txt", "after_optimizations-buffer-assignment.txt"
LAST = "after_optimizations_after_buffer_assignment.txt"  # when it is there, the others are complete
ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
ELSEWHERE = ("color", "thread-local")  # buffers in other memories than the large one


class Decided(NamedTuple):
    """A program before code is generated; bytes of one device."""

    text: str
    arguments: int
    results: int  # those that take the place of arguments too
    temporary: int
    total: int  # of all together; code, some ten MiB, comes to it


def listen() -> Path:
    """Has compilers of this process write what they decide to a folder, which is returned.

    To be called before JAX has looked for devices.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # what comes from there is not written
    folder = Path(tempfile.mkdtemp(prefix="plan-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{given} --xla_dump_to={folder} --xla_dump_hlo_as_text"
    return folder


def decided(lowered, folder: Path) -> Decided:
    """What the compiler decides of a lowered program; it goes on behind, until the process ends.

    Raises: what the compiler raises before it has decided.
    """
    old, behind = found(folder), ThreadPoolExecutor(1).submit(lowered.compile)
    while not behind.done() and found(folder) == old:
        time.sleep(0.1)
    if found(folder) == old:
        behind.result()  # raises
    (last,) = found(folder) - old
    return read(last)


def found(folder: Path) -> set[Path]:
    return set(folder.rglob(f"*.{LAST}"))


def read(last: Path) -> Decided:
    beside = lambda name: last.with_name(last.name.removesuffix(LAST) + name).read_text()
    return Decided(beside(TEXT), *sizes(beside(BUFFERS)))


def sizes(buffers: str) -> tuple[int, int, int, int]:
    """Bytes of arguments, of results, of temporary buffers and of all, by the compiler's list of buffers."""
    there = [(int(size), what) for size, what in ALLOCATION.findall(buffers)]
    there = [(size, what) for size, what in there if not any(other in what for other in ELSEWHERE)]
    of = lambda kind: sum(size for size, what in there if kind in what)
    return of("parameter"), of("maybe-live-out"), of("preallocated-temp"), of("")


def leave(folder: Path, status: int):
    """Ends the process, and with it compilers that were left behind, which nothing else stops."""
    sys.stdout.flush()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(status)
