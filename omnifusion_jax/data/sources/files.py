"""The files of a source that may have several: one file, a folder, a glob, or a range in braces."""

import glob
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omnifusion_jax.errors import DataError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# train-00000-of-00002.parquet; older versions of `datasets` added a hash
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(-[0-9a-f]{16})?\.[a-z]+")
AT_ONCE = 16  # files that are looked into together: the wait is for the disk


def files_at(path: str | Path, suffix: str) -> list[Path]:
    """The files at a path, in the order of their names.

    Args:
      path: a file; a folder, of which the files that end in `suffix` count, or if it has none those in its
        folder `data`; a glob (`data/train-*.parquet`); or a range (`shard-{000..123}.tar`), of which no file
        may be missing.

    Raises:
      DataError: there are none, some are missing, or a folder holds several splits.
    """
    if Path(path).is_file():
        return [Path(path)]
    if Path(path).is_dir():
        return files_in(Path(path), suffix)
    names = in_range(str(path))
    if names and names != [str(path)]:
        missing = [name for name in names if not Path(name).is_file()]
        if missing:
            raise DataError(
                f"{path}: {len(missing)} of its {len(names)} files do not exist, e.g. {missing[0]}. "
                "Add them, or name the range that there is",
                "missing",
            )
        return [Path(name) for name in names]
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(f"{path} does not exist: data.path names a file, a folder or a glob", "missing")
    return found


def in_range(name: str) -> list[str]:
    """The names that a name with ranges in braces stands for; numbers are as wide as the range's first."""
    found = RANGE.search(name)
    if not found:
        return [name]
    first, last = found.groups()
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    before, after = name[: found.start()], name[found.end() :]
    return [one for number in numbers for one in in_range(before + number + after)]


def files_in(folder: Path, suffix: str) -> list[Path]:
    found = ending(folder, suffix) or ending(folder / "data", suffix)
    if not found:
        inside = sorted({file.parent.name for file in folder.glob(f"*/*{suffix}")})
        advice = f"Give a folder in it: {', '.join(inside)}" if inside else "Give a folder that has some"
        raise DataError(f"{folder} has no {suffix} files. {advice}", "missing")
    numbered = [NUMBERED.fullmatch(file.name) for file in found]
    sets = sorted({f"{match[1]}-*-of-{match[3]}" for match in numbered if match})
    if len(sets) > 1:
        one = found[0].parent / (sets[0] + "*" + suffix)
        raise DataError(f"{folder} holds several sets of files, {', '.join(sets)}: give one, e.g. {one}")
    numbers = sorted(int(match[2]) for match in numbered if match)
    if sets and (numbers != list(range(int(sets[0][-5:]))) or not all(numbered)):
        raise DataError(
            f"{folder} is not just the files {sets[0]}: some are missing, or others stand beside them. "
            "Complete it, or give a glob of those you mean",
            "missing",
        )
    return found


def ending(folder: Path, suffix: str) -> list[Path]:
    """The files in a folder that end in `suffix`, without hidden ones, which copying from a Mac leaves."""
    return sorted(file for file in folder.glob(f"*{suffix}") if not file.name.startswith("."))


def each(look: Callable[[Any], Any], files: Iterable) -> list:
    """[look(file), ...], several at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(look, files))
