"""Dialogues in columns: Parquet files, and the Arrow files of Hugging Face `datasets`."""

import hashlib
import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from omnifusion_jax.data.dialogues import Dialogue, from_record
from omnifusion_jax.data.sources.arrow_file import ArrowFile, arrow_files, faults
from omnifusion_jax.data.sources.files import each, files_at
from omnifusion_jax.data.sources.parquet_file import ParquetFile
from omnifusion_jax.data.sources.recent import Recent
from omnifusion_jax.data.sources.rows import record_of
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES

LARGE = 1 << 26  # bytes of a row group that take a noticeable time to decode for a single dialogue
KEPT = 1 << 28  # bytes of decoded row groups that a process keeps


class ColumnSource:
    """The rows of files of a kind, ParquetFile or ArrowFile, all with the same columns of `rows.chosen`.

    Pictures are bytes, {"bytes", "path"}, or names relative to the folder `images`.

    The `fingerprint` covers names, sizes and numbers of rows of the files and the `digest` of each, which is
    cheap for any amount of data; what changes in the midst of a file and leaves all of these as they are goes
    unnoticed.

    Raises:
      DataError: a file cannot be read, has no turns, or has other columns than the first; or there are no
        rows. A row that cannot be used raises it when asked for.
    """

    def __init__(self, files: list[Path], kind: type[ParquetFile | ArrowFile], images: str | Path):
        self.images = Path(images)
        self.files = each(kind, files)
        for file in self.files:
            check_same(file, self.files[0])
        # (its file, its number there, the row of the file that it begins with) of every part
        self.parts = [
            (file, number, start)
            for file in self.files
            for number, start in zip(range(len(file.rows)), accumulate(file.rows, initial=0), strict=False)
        ]
        self.starts = np.cumsum([0, *(rows for file in self.files for rows in file.rows)])
        if not len(self):
            raise DataError(f"{files[0]} holds no dialogues")
        self.fingerprint = fingerprint(self.files)
        largest = max(file.bytes for file in self.files)
        self.part = Recent(self.read, max(1, KEPT // largest) if largest else math.inf)
        self.ids = Recent(self.read_ids, 2)
        if largest > LARGE:
            print(
                f"{files[0].parent}: row groups hold up to {largest / 1e6:,.0f} MB, and a dialogue asked for "
                "at random needs a whole one decoded.\n"
                "python -m omnifusion_jax.prepare_data makes files that are faster to read so",
                flush=True,
            )

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Dialogue:
        where, (part, row) = self.where(i), self.place(i)
        try:
            table = self.part(part)
            with faults("text"):
                (found,) = table.slice(row, 1).to_pylist()
            record = record_of(found)
        except DataError as error:
            raise error.at(where) from error
        return from_record(record, where, self.images)

    def id(self, i: int) -> Any:
        part, row = self.place(i)
        try:
            return self.ids(part)[row] if "id" in self.files[0].columns else None
        except DataError as error:
            raise error.at(self.where(i)) from error

    def where(self, i: int) -> str:
        """The place of a dialogue, for messages: its file and its row, from 0 on."""
        part, row = self.place(i)
        file, _, start = self.parts[part]
        return f"{file.path}[{start + row}]"

    def place(self, i):
        """(number of the part, row in it) of a dialogue."""
        i = range(len(self))[i]
        part = int(np.searchsorted(self.starts, i, "right")) - 1
        return part, i - int(self.starts[part])

    def read(self, part):
        file, number, _ = self.parts[part]
        return file.part(number)

    def read_ids(self, part):
        file, number, _ = self.parts[part]
        return file.part(number, ["id"])["id"].to_pylist()


def check_same(file, first):
    if set(file.columns) != set(first.columns):
        raise DataError(
            f"{file.path} has the columns {', '.join(file.columns)}, but {first.path} has "
            f"{', '.join(first.columns)}. Give them as data sets of their own, or rename columns",
            "form",
        )


def fingerprint(files):
    whole = hashlib.blake2b(digest_size=16)
    for file in files:
        facts = (file.path.name, file.path.stat().st_size, file.rows, file.digest)
        whole.update(repr(facts).encode())
    return whole.hexdigest()


@SOURCES.row("parquet")
def parquet_source(path: str | Path, images: str | Path = "", side: int = 0) -> ColumnSource:
    """A ColumnSource of `.parquet` files: one, a folder, or a glob."""
    return ColumnSource(files_at(path, ".parquet"), ParquetFile, images)


@SOURCES.row("arrow")
def arrow_source(path: str | Path, images: str | Path = "", side: int = 0) -> ColumnSource:
    """A ColumnSource of `.arrow` files: one, a folder, a glob, or what `Dataset.save_to_disk` leaves."""
    return ColumnSource(arrow_files(path), ArrowFile, images)
