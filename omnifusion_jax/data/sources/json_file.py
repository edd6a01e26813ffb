"""LLaVA JSON lists, and JSONL files of LLaVA records or messages."""

import json
import os
from pathlib import Path
from typing import Any

from omnifusion_jax.data.dialogues import Dialogue, from_record
from omnifusion_jax.data.sources.index import indexed
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES


@SOURCES.row("json")
class JsonSource:
    """The records of a `.json` or `.jsonl` file; pictures are named relative to the folder `images`.

    Only the places of the records are in memory, see `index`. The `fingerprint` covers the text of the file,
    not the pictures that it names.

    Raises:
      DataError: the file cannot be read or has no dialogues. A broken record raises it when asked for.
    """

    def __init__(self, path: str | Path, images: str | Path = "", side: int = 0):
        self.path, self.images = Path(path), Path(images)
        if self.path.is_dir():
            inside = sorted(file for file in self.path.iterdir() if file.suffix in (".json", ".jsonl"))
            example = inside[0] if inside else self.path / "dialogues.json"
            raise DataError(f"{self.path} is a folder: give the file in it, e.g. {example}")
        if not self.path.is_file():
            raise DataError(
                f"{self.path} does not exist: data.path names a LLaVA JSON or JSONL file, another source "
                "(docs/data.md), or synthetic:captions"
            )
        self.file = open(self.path, "rb")  # noqa: SIM115, it is read as long as the source lives
        self.index = indexed(self.path)
        self.fingerprint = self.index.fingerprint
        if not len(self):
            raise DataError(f"{path} holds no dialogues")

    def __getstate__(self):  # for worker processes, which map the index themselves
        index = None if self.index.mapped else self.index
        return vars(self) | {"file": None, "index": index}

    def __setstate__(self, state):
        vars(self).update(state)
        self.file = open(self.path, "rb")  # noqa: SIM115
        self.index = self.index or indexed(self.path)
        if self.index.fingerprint != self.fingerprint:
            raise DataError(f"{self.path} was changed while it was being read")

    def __len__(self):
        return len(self.index.lines)

    def __getitem__(self, i: int) -> Dialogue:
        data = self.text(i)
        return from_record(parsed(data, self.where(i)), self.where(i), self.images)

    def text(self, i: int) -> bytes:
        """What the file says of a record."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, there is no record {i}")
        start, end = self.index.starts[i : i + 2].tolist()
        data = os.pread(self.file.fileno(), end - start, start)  # safe in threads, unlike seek and read
        return data if self.by_line else data.rstrip(b" \t\r\n,")  # the comma before the next one

    def id(self, i: int) -> Any:
        record = parsed(self.text(i), self.where(i))
        return record.get("id") if isinstance(record, dict) else None

    def line(self, i: int) -> int:
        """The line of the file in which a record begins, from 1 on."""
        return int(self.index.lines[i])

    @property
    def by_line(self) -> bool:
        return self.path.suffix == ".jsonl"

    def where(self, i: int) -> str:
        """The place of a record, for messages."""
        return f"{self.path}:{self.line(i)}" if self.by_line else f"{self.path}[{i}]"


def parsed(data: bytes, where: str, what: str = "the line"):
    """The value of the JSON that `data` begins with. Raises DataError, which names `where` and `what`."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}). Save it as UTF-8", "not_utf8") from None
    except RecursionError:
        raise DataError(f"{where}: not JSON (nested too deeply)", "not_json") from None
    except ValueError as error:
        message = getattr(error, "msg", "too long a number")
        raise DataError(f"{where}: not JSON ({message}). Correct or remove {what}", "not_json") from None
