"""Where each record of a JSON or JSONL file begins: found once, kept beside the file, never held as objects.

Files below SMALL are looked through at every start. For others the file `dialogues.json.index`, which `kept`
writes, holds int64[records + 1], the byte at which each record begins and the end of the last, and
int32[records], the line of each. It is mapped into memory: a process holds 12 bytes a record at most.
"""

import codecs
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from omnifusion_jax.data.sources.kept import kept
from omnifusion_jax.errors import DataError

VERSION = 2
CHUNK = 1 << 24  # bytes read at a time
SMALL = 1 << 24  # bytes
LONG = 1 << 28  # bytes: finding the records of a longer file takes seconds, which is said
BLANK = b" \t\r\n"
CUT_NUMBER = re.compile(r"\.|[eE][+-]?")  # what follows the "1" of "1.5" or "1e+5" if a chunk ends there


class Index(NamedTuple):
    """The records of a file."""

    starts: np.ndarray  # int64[records + 1]
    lines: np.ndarray  # int32[records], from 1 on
    fingerprint: str  # a hash of the whole file
    mapped: bool  # from a file, not in memory


def indexed(path: Path) -> Index:
    """The Index of a JSON list, or of a JSONL file if its name ends in .jsonl.

    It is made anew when the file has another size or time of change than the index was made from.

    Raises:
      DataError: the file is no JSON list (in a JSONL file a broken line is a record like any other).
    """
    stat = path.stat()
    made_from = {"version": VERSION, "size": stat.st_size, "changed": stat.st_mtime_ns}
    small = stat.st_size < SMALL
    find = functools.partial(found, path, stat)
    place = path.with_name(path.name + ".index")
    facts, (starts, lines) = find() if small else kept(place, made_from, find)
    return Index(starts, lines, facts["fingerprint"], mapped=not small)


def found(path: Path, stat: os.stat_result) -> tuple[dict, list[np.ndarray]]:
    """Looks through a file: (its fingerprint, [starts, lines])."""
    if stat.st_size > LONG:
        print(f"{path}: finding its records, once ({stat.st_size / 1e9:.1f} GB)", flush=True)
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        scan = lines_of if path.suffix == ".jsonl" else elements_of
        parts = list(scan(hashed(file, digest), path))
        for _ in hashed(file, digest):
            pass  # what follows the list
    starts = np.concatenate([np.zeros(0, np.int64), *(part[0] for part in parts)])
    lines = np.concatenate([np.zeros(0, np.int32), *(part[1] for part in parts)])
    if path.stat().st_mtime_ns != stat.st_mtime_ns:
        raise DataError(f"{path} was changed while it was read: start again when it is complete")
    return {"fingerprint": digest.hexdigest()}, [starts, lines]


def hashed(file: BinaryIO, digest) -> Iterator[bytes]:
    """The rest of a file in chunks, all of which go into `digest`."""
    while chunk := file.read(CHUNK):
        digest.update(chunk)
        yield chunk


def lines_of(chunks: Iterator[bytes], path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (starts, lines) of the lines of each chunk that are not blank; at last the end of the file.

    Lines end at "\\n" alone: JSON strings may hold other characters that end lines elsewhere.
    """
    rest, offset, number = b"", 0, 1  # what follows the last line end, its place and the number of its line
    for chunk in itertools.chain(chunks, [None]):
        if chunk is None:
            data, ends = rest, np.array([len(rest)] if rest else [], np.int64)
        else:
            data = rest + chunk
            if offset == 0 and data.startswith(codecs.BOM_UTF8):
                data, offset = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
            ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)]
        first = np.frombuffer(data, np.uint8)[starts]
        kept = np.ones(len(starts), bool)
        for i in np.flatnonzero(np.isin(first, list(BLANK))):
            kept[i] = bool(data[starts[i] : ends[i]].strip(BLANK))
        yield starts[kept] + offset, (np.flatnonzero(kept) + number).astype(np.int32)
        last = int(ends[-1]) if len(ends) else 0
        rest, offset, number = data[last:], offset + last, number + len(ends)
    yield np.array([offset]), np.zeros(0, np.int32)


def elements_of(chunks: Iterator[bytes], path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (starts, lines) of the elements of a JSON list, many at a time; at last the end of the list.

    Elements are parsed and dropped, one after the other.
    """
    text = Text(chunks, path)
    if not text.peek():
        yield np.zeros(1, np.int64), np.zeros(0, np.int32)
        return
    if text.peek() != "[":
        kind = {"{": "dict", '"': "str"}.get(text.peek(), "single value")
        text.element()  # raises its error, if it is not even that
        if text.peek():
            text.fail("Extra data")
        raise DataError(f"{path}: a list of dialogues is expected, this is a {kind}. Put it in [ ]")
    text.skip()
    starts, lines, first = [], [], True
    while text.peek() != "]":
        if not first:
            if text.peek() != ",":
                text.fail("Expecting ',' delimiter")
            text.skip()
            text.peek()
        first = False
        starts.append(text.offset)
        lines.append(text.line)
        text.element()
        if len(starts) == 1 << 16:
            yield np.array(starts), np.array(lines, np.int32)
            starts, lines = [], []
    end = text.offset
    text.skip()
    if text.peek():
        text.fail("Extra data")
    yield np.array([*starts, end], np.int64), np.array(lines, np.int32)


class Text:
    """The text of a JSON file, of which only a piece is in memory; `offset` and `line` say where it is read.

    Bytes that are not UTF-8 are passed over: the record that holds them cannot be used, all others can.
    """

    def __init__(self, chunks: Iterator[bytes], path: Path):
        self.chunks, self.path = chunks, path
        self.decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self.parse = json.JSONDecoder().raw_decode
        self.text, self.at, self.offset, self.line, self.ended = "", 0, 0, 1, False
        self.more()
        if self.text.startswith("\ufeff"):
            self.at, self.offset = 1, len(codecs.BOM_UTF8)

    def more(self):
        """Drops what was read, and adds as much as is in memory, a chunk at least."""
        kept = self.text[self.at :]
        pieces, wanted = [kept], max(len(kept), 1)
        while wanted > 0 and not self.ended:
            chunk = next(self.chunks, b"")
            self.ended = not chunk
            pieces.append(self.decode(chunk, final=self.ended))
            wanted -= len(pieces[-1])
        self.text, self.at = "".join(pieces), 0

    def pass_to(self, end):
        passed = self.text[self.at : end]
        self.line += passed.count("\n")
        self.offset += len(passed) if passed.isascii() else len(passed.encode(errors="surrogateescape"))
        self.at = end

    def skip(self):
        self.pass_to(self.at + 1)

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end."""
        while True:
            end = self.at
            while end < len(self.text) and self.text[end] in " \t\r\n":
                end += 1
            self.pass_to(end)
            if end < len(self.text) or self.ended:
                return self.text[end : end + 1]
            self.more()

    def element(self):
        """Passes over one value. Raises DataError if it is not JSON."""
        while True:
            try:
                _, end = self.parse(self.text, self.at)
                if self.ended or (end < len(self.text) and not CUT_NUMBER.fullmatch(self.text, end)):
                    return self.pass_to(end)
            except json.JSONDecodeError as error:
                cut_off = error.pos > len(self.text) - 64 or error.msg.startswith("Unterminated string")
                if self.ended or not cut_off:
                    self.pass_to(error.pos)
                    self.fail(error.msg)
            except (ValueError, RecursionError) as error:
                self.fail("nested too deeply" if isinstance(error, RecursionError) else "too long a number")
            self.more()

    def fail(self, message):
        raise DataError(
            f"{self.path}:{self.line}: not JSON ({message}). "
            "A file with one object a line must be named .jsonl",
            "not_json",
        )
