"""What is written: which records, how many a shard, and each with the bytes of its media."""

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from omnifusion_jax.data.dialogues import IMAGE, Dialogue, Media
from omnifusion_jax.data.images import picture_file
from omnifusion_jax.data.sources.array_record import packed
from omnifusion_jax.data.sources.base import ENDLESS, Source
from omnifusion_jax.errors import DataError

SAMPLE = 64  # records whose sizes decide how many are in a shard
# Shards at least, of as many records at least: so that several processes have something to do
SHARDS, FEW = 16, 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides the bytes of the shards. A folder is gone on with if its plan is the same."""

    data: str  # path of the source, as it was given
    images: str
    fingerprint: str | None  # of the source
    records: int  # of the source, or the first so many of them
    shard_records: int
    max_pixels: int
    # what makes features of the media, as data.features has it; None: media stay what they are
    features: dict | None = None

    def __len__(self):  # the number of shards
        return -(-self.records // self.shard_records)

    def range(self, shard: int) -> range:
        """The records of a shard, as the source numbers them."""
        start = shard * self.shard_records
        return range(start, min(start + self.shard_records, self.records))

    def file(self, shard: int) -> str:
        return f"dialogues-{shard:05d}-of-{len(self):05d}.array_record"


def planned(
    source: Source,
    data: str,
    images: str = "",
    *,
    count: int | None = None,
    shard_records: int | None = None,
    shard_bytes: int = 1 << 28,
    max_pixels: int = 50_000_000,
    features: dict | None = None,
    size: Callable[[Dialogue], int] | None = None,
) -> Plan:
    """The Plan for a source.

    Args:
      data: the path that `source` was opened with; `images` its folder.
      count: only the first so many records.
      shard_records: records in a shard; when not given, as many as make `shard_bytes`, judged by records that
        are evenly spaced in the source, and fewer if there would be few shards.
      features: what makes features of the media.
      size: bytes of a dialogue's record; None: of one with the files of its media.

    Raises:
      DataError: there are fewer records than `count`, or no end of them and no `count`.
    """
    if count is None and len(source) >= ENDLESS:
        raise DataError(f"{data} has no end: --count=N says how many records to write")
    if count is not None and count > len(source):
        raise DataError(f"--count={count}: {data} has {len(source)} records")
    records = count or len(source)
    size = size or (lambda dialogue: len(packed(whole(dialogue, max_pixels))))
    if shard_records is None:
        sizes = []
        for i in range(0, records, -(-records // SAMPLE)):
            with contextlib.suppress(DataError):  # it is told when its turn comes
                sizes.append(size(source[i]))
        by_size = shard_bytes * len(sizes) // max(1, sum(sizes))
        shard_records = max(1, min(by_size, max(FEW, -(-records // SHARDS))))
    fingerprint = getattr(source, "fingerprint", None)
    return Plan(data, images, fingerprint, records, min(shard_records, records), max_pixels, features)


def whole(dialogue: Dialogue, max_pixels: int) -> Dialogue:
    """The dialogue with the bytes of its media. Raises DataError, which names it, if they cannot be used."""
    try:
        media = tuple(Media(one.stream, file_of(one, max_pixels)) for one in dialogue.media)
    except DataError as error:
        raise error.at(dialogue.where) from None
    return dataclasses.replace(dialogue, media=media)


def file_of(media: Media, max_pixels: int) -> bytes:
    """The bytes of the file of a media item; of pictures the header is looked at."""
    if media.stream == IMAGE:
        return picture_file(media.source, max_pixels=max_pixels)
    if isinstance(media.source, bytes):
        return media.source
    if not isinstance(media.source, str | os.PathLike):
        kind = type(media.source).__name__
        raise DataError(f'"{media.stream}" is a {kind}: name its file, only files are kept', "media")
    try:
        return Path(media.source).read_bytes()
    except OSError as error:
        raise DataError(f"{media.source}: {error.strerror}. Check the name", "missing") from None
