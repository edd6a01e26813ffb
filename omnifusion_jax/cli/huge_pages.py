"""Huge pages for training on a CPU.

XLA allocates its temporary buffers anew each step. Handed out 4 kB at a time, they take a third of a step
(docs/performance.md). glibc asks for huge pages when GLIBC_TUNABLES says so, which it reads as a process
starts: so the command starts itself again, once, with the variable set.
"""

import glob
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TUNABLES, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
SINCE = (2, 35)  # the glibc that knows the setting
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Files that a machine with a GPU or a TPU has; XLA then allocates little on the host.
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def ensure(module: str):
    """Starts this process again with huge pages, if it is `python -m MODULE ...` on a CPU and lacks them.

    To be called before JAX is imported. The process keeps its number, its command line, its open files and
    what else it was given; it does nothing twice, since nothing was done yet.
    """
    own = ["-m", module, *sys.argv[1:]]
    if sys.orig_argv[-len(own) :] != own:  # a fork of another process, or called from a program
        return
    if tunables := wanted(os.environ, glibc(), mode(), accelerators()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, TUNABLES: tunables})


def wanted(
    environment: Mapping[str, str], glibc: tuple[int, ...], mode: str, accelerators: Sequence[str]
) -> str | None:
    """What GLIBC_TUNABLES should be, or None where it is to stay as it is.

    Args:
      glibc: its version, () for another library.
      mode: of the kernel's huge pages: always, madvise or never. With `always` they come unasked, and glibc
        ignores the setting.
      accelerators: files of devices that JAX would use unless JAX_PLATFORMS names others.
    """
    given = environment.get(TUNABLES, "")
    platforms = environment.get("JAX_PLATFORMS", "")
    on_cpu = platforms.split(",")[0] == "cpu" if platforms else not accelerators
    if not on_cpu or "hugetlb" in given or mode != "madvise" or glibc < SINCE:
        return None
    return f"{given}:{SETTING}".removeprefix(":")


def glibc() -> tuple[int, ...]:
    """Its version; () where the C library is another."""
    known = "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ())
    found = os.confstr("CS_GNU_LIBC_VERSION") if known else None
    return tuple(map(int, re.findall(r"\d+", found or "")))


def mode() -> str:
    """How the kernel gives huge pages: always, madvise or never."""
    found = re.search(r"\[(\w+)\]", KERNEL.read_text()) if KERNEL.exists() else None
    return found[1] if found else "never"


def accelerators() -> list[str]:
    return [file for pattern in ACCELERATORS for file in glob.glob(pattern)]
