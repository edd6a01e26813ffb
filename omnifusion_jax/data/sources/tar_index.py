"""Which members of tar shards make a sample, and where they are: found once, kept beside the shards.

Of small sets it is found at every start. For others the file `shards-....index` beside the first shard (for
one alone `shard.tar.index`), which `kept` writes, holds int64[samples + 1], where each Sample begins, and the
Samples as JSON, one after the other.
"""

import functools
import hashlib
import json
import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from omnifusion_jax.data.images import MAX_FILE_BYTES
from omnifusion_jax.data.sources.files import each
from omnifusion_jax.data.sources.index import LONG, SMALL
from omnifusion_jax.data.sources.kept import kept
from omnifusion_jax.errors import DataError

VERSION = 1
# What is used of a sample: its record, and its pictures
RECORD, PICTURES = "json", ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")
# folder/name.extension: the key is all before the first dot of the name
MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
COMPRESSED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",
)  # how gzip, bzip2, xz and zstd files begin


class Sample(NamedTuple):
    """The members of a shard that have one key."""

    shard: int  # number of the shard
    key: str  # with its folder
    whole: bool  # False of the last one of a shard that does not end as it should
    members: list[tuple[str, int, int]]  # (extension, first byte, bytes); first byte -1 of a link


class Index(NamedTuple):
    """The samples of shards: sample i is `text[starts[i] : starts[i + 1]]`."""

    starts: np.ndarray  # int64[samples + 1]
    text: np.ndarray  # uint8[bytes]
    fingerprint: str  # a hash of all samples and of the text of their records
    mapped: bool  # from a file, not in memory

    def sample(self, i: int) -> Sample:
        start, end = self.starts[i : i + 2].tolist()
        return Sample(*json.loads(self.text[start:end].tobytes()))


def indexed(shards: list[Path]) -> Index:
    """The Index of tar files. It is made anew when one has another size or time of change.

    Raises:
      DataError: a file is not a tar file, is compressed, or is damaged at its beginning.
    """
    stats = [shard.stat() for shard in shards]
    made_from = {"version": VERSION, "shards": hashed([(stat.st_size, stat.st_mtime_ns) for stat in stats])}
    size = sum(stat.st_size for stat in stats)
    find = functools.partial(found, shards, size)
    facts, (starts, text) = find() if size < SMALL else kept(place(shards), made_from, find)
    return Index(starts, text, facts["fingerprint"], mapped=size >= SMALL)


def place(shards: list[Path]) -> Path:
    """Where the index of shards belongs; other choices of shards in a folder have others."""
    if len(shards) == 1:
        return shards[0].with_name(shards[0].name + ".index")
    return shards[0].with_name(f"shards-{hashed(*map(str, shards))[:12]}.index")


def hashed(*facts) -> str:
    return hashlib.blake2b(repr(facts).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def found(shards: list[Path], size: int) -> tuple[dict, list[np.ndarray]]:
    """Looks through shards: (their fingerprint, [starts, text])."""
    if size > LONG:
        print(
            f"{shards[0]}: finding the samples, once ({len(shards)} files, {size / 1e9:.1f} GB)", flush=True
        )
    parts = each(lambda number: samples_of(shards[number], number), range(len(shards)))
    lengths, texts, digests = zip(*parts, strict=True)
    starts = np.cumsum(np.concatenate([[0], *lengths])).astype(np.int64)
    text = np.frombuffer(b"".join(texts), np.uint8)
    return {"fingerprint": hashed(digests, hashlib.sha256(text).hexdigest())}, [starts, text]


def samples_of(shard: Path, number: int) -> tuple[np.ndarray, bytes, str]:
    """Looks through a tar file.

    Returns:
      int64[samples], how many bytes each Sample takes as JSON; these bytes; a hash of the text of the
      records.
    """
    members, last, digest = {}, None, hashlib.blake2b(digest_size=16)
    with open(shard, "rb") as file:
        infos, whole = read(file, shard)
        for info in infos:
            named = MEMBER.fullmatch(info.name.removeprefix("./"))
            if not named or info.isdir():
                continue
            last, extension = (part.encode(errors="backslashreplace").decode() for part in named.groups())
            extension = extension.lower()
            listed = members.setdefault(last, [])
            if extension == RECORD or extension.split(".")[-1] in PICTURES:
                plain = info.isreg() and info.sparse is None
                listed.append((extension, info.offset_data if plain else -1, info.size))
                if extension == RECORD and plain:
                    digest.update(os.pread(file.fileno(), min(info.size, MAX_FILE_BYTES), info.offset_data))
    if not (whole or members):
        raise DataError(f"{shard} is damaged before its first sample. Copy it again", "damaged")
    samples = (Sample(number, key, whole or key != last, listed) for key, listed in members.items())
    lines = [json.dumps(sample).encode() for sample in samples]
    return np.array([len(line) for line in lines], np.int64), b"".join(lines), digest.hexdigest()


def read(file: BinaryIO, shard: Path) -> tuple[list[tarfile.TarInfo], bool]:
    """The members of a tar file, and whether it ends after them as it should. Raises DataError."""
    if file.read(8).startswith(COMPRESSED):
        raise DataError(
            f"{shard} is compressed, and cannot be read at random. Unpack it (gzip -d for .gz), and give the "
            "path of what comes out",
            "compressed",
        )
    file.seek(0)
    members = []
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115, who opened the file closes it
        while (member := tar.next()) is not None:
            if tar.offset <= member.offset:  # its size is negative, and this would never end
                return members, False
            members.append(member)
    except (tarfile.TarError, ValueError, RecursionError) as error:
        if not members:
            raise DataError(
                f"{shard} is not a tar file, or is damaged at its beginning. Copy it again", "damaged"
            ) from error
        return members, False
    # tarfile takes a header that it cannot read as the end, which is a block of zeros
    return members, os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) == bytes(tarfile.BLOCKSIZE)
