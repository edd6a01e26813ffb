"""Arrays that take long to find are kept in a file beside the data, and mapped into memory from then on.

Such a file begins with a line of JSON (what the arrays were made from, what else was found out, their types
and lengths), padded to HEADER bytes. The arrays follow, one after the other.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from omnifusion_jax.errors import DataError

HEADER = 512


def kept(
    place: Path, made_from: dict, make: Callable[[], tuple[dict, list[np.ndarray]]]
) -> tuple[dict, list[np.ndarray]]:
    """(facts, arrays) as `make` gives them, mapped from a file that this or another process wrote.

    Args:
      place: the file. If its folder is not ours, one with temporary files takes its place.
      made_from: what JSON can hold; a file that was made from anything else is made anew.
      make: its facts are what JSON can hold, a few hundred characters with `made_from`; its arrays begin with
        those of the largest items, since a file holds no gaps.

    Raises:
      DataError: there is no place where the file can be written.
    """
    for there in places(place):
        header = read(there)
        if header and made_from.items() <= header.items():
            return header, mapped(there, header)
    facts, arrays = make()
    described = [[array.dtype.str, len(array)] for array in arrays]
    header = made_from | facts | {"arrays": described}
    for there in places(place):
        with contextlib.suppress(OSError):
            write(there, header, arrays)
            return header, mapped(there, header)
    raise DataError(f"{place} can be written neither there nor to {tempfile.gettempdir()}. Make room for it")


def places(place: Path) -> list[Path]:
    """Where the file may be: where it should be, or with temporary files."""
    name = hashlib.blake2b(os.fsencode(place.absolute()), digest_size=8).hexdigest()
    return [place, Path(tempfile.gettempdir(), f"omnifusion-{os.getuid()}-{name}.index")]


def read(place: Path) -> dict | None:
    """The header of a file, or None if there is none that can be used."""
    try:
        with open(place, "rb") as file:
            header = json.loads(file.read(HEADER))
        whole = HEADER + sum(np.dtype(kind).itemsize * length for kind, length in header["arrays"])
        return header if place.stat().st_size == whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def mapped(place: Path, header: dict) -> list[np.ndarray]:
    arrays, start = [], HEADER
    for kind, length in header["arrays"]:
        # nothing cannot be mapped
        array = np.memmap(place, kind, "r", start, (length,)) if length else np.zeros(0, kind)
        arrays.append(array)
        start += array.nbytes
    return arrays


def write(place: Path, header: dict, arrays: list[np.ndarray]) -> None:
    """Writes a file under another name first, since several processes may do so at once."""
    line = json.dumps(header).encode()
    assert len(line) <= HEADER, f"a header of {len(line)} bytes"
    beside = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            file.write(line.ljust(HEADER))
            for array in arrays:
                file.write(array.tobytes())
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)
