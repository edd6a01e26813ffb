"""Folders that `python -m omnifusion_jax.prepare_data` writes: whole dialogues with their media.

Such a folder holds ArrayRecord files, its shards, and `dataset.json`, which says how many records and bytes
each of them has, what they were made from and a fingerprint of all of it. A record is a msgpack map of the
fields of a Dialogue, with a media item as [stream, bytes of its file], or of its features (data/features.py).
"""

import functools
import json
import re
from pathlib import Path

import msgpack
import numpy as np

from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.data.features import Features
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES

MANIFEST = "dataset.json"
UNFINISHED = "unfinished"  # a folder that is there until all shards are
FORMAT, VERSION = "omnifusion_jax dialogues", 1
AT_RANDOM = "readahead_buffer_size:0,max_parallelism:0"  # reads a record, not those that follow it
BUFFER = 1 << 15  # bytes, of an open shard
OPEN = 128  # shards open at a time, of the 1024 files that systems commonly allow a process
NAMED = re.compile(r' \(id "(.*)"\)$', re.DOTALL)  # the end of Dialogue.where, if the dialogue has an id
ANEW = "Write them again with python -m omnifusion_jax.prepare_data"


@SOURCES.row("array_record")
class ArrayRecordSource:
    """The dialogues of a folder of ours; they read as they were written, media as bytes.

    The `fingerprint` covers turns and media, not where they came from or how many are in a shard. `made_by`
    says what made features of the media, and is None where they are files.

    Raises:
      DataError: the folder is none of ours, is not complete, or its shards are not what `dataset.json` says.
        A damaged record raises it when asked for.
    """

    def __init__(self, path: str | Path, images: str | Path = "", side: int = 0):
        self.folder = Path(path)
        self.manifest = read_manifest(self.folder)
        self.fingerprint = self.manifest["fingerprint"]
        self.made_by = self.manifest["made_from"].get("features")
        self.shards = self.manifest["shards"]
        self.ends = np.cumsum([shard["records"] for shard in self.shards])
        self.reader = functools.lru_cache(OPEN)(self.opened)
        for shard in range(len(self.shards)):
            self.check_size(shard)

    def __getstate__(self):  # for worker processes, which open the shards themselves
        return {name: value for name, value in vars(self).items() if name != "reader"}

    def __setstate__(self, state):
        vars(self).update(state)
        self.reader = functools.lru_cache(OPEN)(self.opened)

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> Dialogue:
        return unpacked(self.record(i), self.where(i), Features if self.made_by else bytes)

    def id(self, i: int) -> str | None:
        """The id that the dialogue had where it came from."""
        named = NAMED.search(unpacked(self.record(i), self.where(i)).where)
        return named and named[1]

    def record(self, i: int) -> bytes:
        shard, position = self.place(i)
        reader = self.reader(shard)  # safe in threads
        try:
            [data] = reader.read([position])
        except RuntimeError:  # its checksum is wrong, or it cannot be read
            raise DataError(f"{self.where(i)}: the record is damaged. {ANEW}", "damaged") from None
        return data

    def where(self, i: int) -> str:
        """The place of a record, for messages."""
        shard, position = self.place(i)
        return f"{self.file(shard)}[{position}]"

    def place(self, i: int) -> tuple[int, int]:
        """(shard, number of the record in it)."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.folder} has {len(self)} records, there is no record {i}")
        shard = int(np.searchsorted(self.ends, i, side="right"))
        return shard, int(i) - int(self.ends[shard]) + self.shards[shard]["records"]

    def file(self, shard: int) -> Path:
        return self.folder / self.shards[shard]["file"]

    def opened(self, shard: int):
        """A reader of a shard. Raises DataError if it holds another number of records than it should."""
        self.check_size(shard)
        found, wanted = open_shard(self.file(shard)), self.shards[shard]["records"]
        if found.num_records() != wanted:
            raise DataError(
                f"{self.file(shard)} holds {found.num_records()} records that can be read, {MANIFEST} says "
                f"{wanted}. {ANEW}",
                "damaged",
            )
        return found

    def check_size(self, shard: int) -> None:
        file, wanted = self.file(shard), self.shards[shard]["bytes"]
        if not file.is_file():
            raise DataError(f"{file} is missing, {MANIFEST} names it. Copy it again. {ANEW}", "missing")
        size = file.stat().st_size
        if size != wanted:
            how = "cut off" if size < wanted else "changed"
            raise DataError(
                f"{file} is {how}: {size:,} bytes of the {wanted:,} that {MANIFEST} says. "
                f"Copy it again. {ANEW}",
                "damaged",
            )


def open_shard(file: Path):
    """An ArrayRecordReader for single records here and there; of a broken file it reads no records."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(file), AT_RANDOM, file_reader_buffer_size=BUFFER)


def read_manifest(folder: Path) -> dict:
    """What `dataset.json` says. Raises DataError for a folder that is none of ours or not complete."""
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {kind}: give the folder that holds {MANIFEST} and *.array_record files")
    if (folder / UNFINISHED).is_dir() and not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} is not complete: start the prepare_data command that began it once more")
    if not (folder / MANIFEST).is_file():
        raise DataError(
            f"{folder} has no {MANIFEST}, so prepare_data did not write it. Files of TensorFlow Datasets are "
            "read as tfds:FOLDER; others need a source of their own, a row of SOURCES"
        )
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        kind, version = found["format"], found["version"]
        shards = [(shard["file"], shard["records"] >= 0, shard["bytes"] > 0) for shard in found["shards"]]
        ours = kind == FORMAT and shards and found["fingerprint"]
    except (ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise DataError(f"{folder / MANIFEST} is damaged, or was not written by prepare_data. {ANEW}")
    if version != VERSION:
        raise DataError(f"{folder / MANIFEST} is of version {version}, read are those of {VERSION}. {ANEW}")
    if outside := [name for name, *_ in shards if Path(name).name != name]:
        raise DataError(f"{folder / MANIFEST} names {outside[0]}, which lies elsewhere. {ANEW}")
    return found


def packed(dialogue: Dialogue) -> bytes:
    """The record of a Dialogue whose media are bytes."""
    return msgpack.packb({"where": dialogue.where, **body(dialogue)}, unicode_errors="surrogatepass")


def body(dialogue: Dialogue) -> dict:
    """All of a Dialogue but the place that it came from."""
    found = {
        "turns": dialogue.turns,
        "media": [list(media) for media in dialogue.media],
        "marked": dialogue.marked,
        "parted": dialogue.parted,
    }
    return found | ({} if dialogue.rejected is None else {"rejected": dialogue.rejected})


def unpacked(data: bytes, where: str, kind: type = bytes) -> Dialogue:
    """The Dialogue of a record, its media of a `kind`.

    Raises DataError, which names `where`, for bytes that are none.
    """
    try:
        found = msgpack.unpackb(data, unicode_errors="surrogatepass")
        turns = tuple((role, text) for role, text in found["turns"])
        media = tuple(Media(stream, kind(source)) for stream, source in found["media"])
        of_form = found["marked"], found["parted"], found.get("rejected")
        return Dialogue(found["where"], turns, media, *of_form)
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where}: the record is no dialogue. {ANEW}", "damaged") from None
