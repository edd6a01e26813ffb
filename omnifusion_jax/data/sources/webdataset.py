"""Tar shards as WebDataset has them: members that share a name are a dialogue and its pictures."""

import dataclasses
import os
from pathlib import Path

from omnifusion_jax.data.dialogues import IMAGE, Dialogue, Media, located, parse
from omnifusion_jax.data.images import MAX_FILE_BYTES, is_data_url, is_url
from omnifusion_jax.data.sources.files import files_at
from omnifusion_jax.data.sources.json_file import parsed
from omnifusion_jax.data.sources.members import extension_of, number, with_pictures
from omnifusion_jax.data.sources.recent import Recent
from omnifusion_jax.data.sources.tar_index import RECORD, Sample, indexed
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES

OPEN = 64  # shards that are open together


@SOURCES.row("webdataset")
class TarSource:
    """The samples of `.tar` shards: one, a folder, a glob, or a range (`shard-{000..123}.tar`).

    `key.json` is a record, and `key.jpg`, `key.png`, ... or `key.0.jpg`, `key.1.png`, ... are its pictures. A
    record may name them (`key.1.png`, `1.png`), else it shows all: those without a number as they stand in
    the shard, then the others by number. Nothing is unpacked; only the places of the members are in memory,
    see `tar_index`. What a record names of other modalities is relative to the folder `images`.

    The `fingerprint` covers the text of the records, and names, places and sizes of the pictures.

    Raises:
      DataError: a shard cannot be read, or there are no samples. One that cannot be used raises it when asked
        for; so does the last one of a shard that is cut off.
    """

    def __init__(self, path: str | Path, images: str | Path = "", side: int = 0):
        self.images = Path(images)
        self.shards = files_at(path, ".tar")
        self.index = indexed(self.shards)
        self.fingerprint = self.index.fingerprint
        self.file = Recent(Opened, OPEN)
        if not len(self):
            raise DataError(f"{path} holds no dialogues")

    def __getstate__(self):  # for worker processes, which map the index themselves
        return vars(self) | {"index": None if self.index.mapped else self.index}

    def __setstate__(self, state):
        vars(self).update(state)
        self.index = self.index or indexed(self.shards)
        if self.index.fingerprint != self.fingerprint:
            raise DataError(f"{self.shards[0].parent}: shards were changed while they were being read")

    def __len__(self):
        return len(self.index.starts) - 1

    def __getitem__(self, i: int) -> Dialogue:
        sample, where = self.sample(i), self.where(i)
        try:
            check(sample)
            members = {extension: place for extension, *place in sample.members}
            text = self.bytes(sample.shard, *members.pop(RECORD))
        except DataError as error:
            raise error.at(where) from error
        record = parsed(text, where, "the file")
        dialogue = parse(with_pictures(record, sorted(members, key=number)), where)
        try:
            media = tuple(self.media(sample, members, *media) for media in dialogue.media)
        except DataError as error:
            raise error.at(dialogue.where) from error
        return dataclasses.replace(dialogue, media=media)

    def media(self, sample, members, stream, source):
        """What a record names, with the bytes of a picture. Raises DataError."""
        if stream != IMAGE or not isinstance(source, str) or is_url(source) or is_data_url(source):
            return Media(stream, located(source, stream, self.images))
        return Media(stream, self.bytes(sample.shard, *members[extension_of(source, sample.key, members)]))

    def bytes(self, shard, start, size):
        """A member of a shard. Raises DataError."""
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"a file of {size:,} bytes; at most {MAX_FILE_BYTES:,} are allowed. Make it smaller",
                "file_size",
            )
        data = self.file(self.shards[shard]).read(size, start)
        if len(data) < size:
            raise DataError("the shard is cut off here. Copy it again", "truncated")
        return data

    def where(self, i: int) -> str:
        """The place of a sample, for messages: its shard and its key."""
        sample = self.sample(i)
        return f"{self.shards[sample.shard]}:{sample.key}"

    def sample(self, i) -> Sample:
        return self.index.sample(range(len(self))[i])


class Opened:
    """A file that several threads may read; it is closed when nothing holds it."""

    descriptor = None

    def __init__(self, path: Path):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if self.descriptor is not None:
            os.close(self.descriptor)

    def read(self, size: int, start: int) -> bytes:
        return os.pread(self.descriptor, size, start)


def check(sample: Sample) -> None:
    """Raises DataError for a sample that cannot be used, whatever its members hold."""
    extensions = [extension for extension, _, _ in sample.members]
    twice = sorted({one for one in extensions if extensions.count(one) > 1})
    links = [extension for extension, start, _ in sample.members if start < 0]
    if not sample.whole:
        raise DataError(
            "its shard is cut off or damaged behind it: it may be incomplete, and others may be lost. "
            "Copy the shard again",
            "truncated",
        )
    if RECORD not in extensions:
        raise DataError(
            f"there is no {sample.key}.{RECORD} in the shard. Add it: it holds the dialogue", "form"
        )
    if twice:
        raise DataError(f"{', '.join(twice)} is there twice. Give each sample a name of its own", "twice")
    if links:
        raise DataError(
            f"{', '.join(links)} is a link or a sparse file. Write the file itself (tar --dereference "
            "--hard-dereference)",
            "link",
        )
