"""A modality as the host sees it: how records hold its media, how a text marks them, what prepares them."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES

NEXT = object()  # source of a media item that is the next of those listed beside the messages


class Prepared(NamedTuple):
    """A media item, ready for the encoders of its stream."""

    # its tiles in each view; of a picture uint8[tiles, size, size, 3], or of one of any shape see batch.PATCH
    views: tuple[np.ndarray, ...]
    # int32[positions]: the feature row that stands at each of its positions in a sequence, numbered through
    # all tiles, or data.tiles.NEWLINE for the trained newline vector
    order: np.ndarray
    rows: int  # feature rows of all tiles
    # (rows, columns) of the tiles after the first, where a chat template writes text between tiles; None: it
    # writes none
    grid: tuple[int, int] | None = None

    @property
    def parts(self) -> int:
        """Into how many equal parts its positions fall, between which there may be text."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]


class Modality(NamedTuple):
    """A row of MODALITIES, under the name of its stream."""

    mark: str  # what stands for a media item in a text, such as "<image>"
    keys: tuple[str, ...]  # under which a record lists its media items: the first that is given counts
    # {type of a part of a message's content: function of (part, where) that returns the source or NEXT}
    parts: dict[str, Callable[[dict, str], Any]]
    # its `of(stream's config, **settings)` makes what prepares the media, such as an ImageProcessor
    processor: type


def first_given(record: dict, keys: tuple[str, ...], default: Any) -> Any:
    """The value of the first of `keys` whose value in `record` is not None, or else `default`."""
    return next((record[key] for key in keys if record.get(key) is not None), default)


def streams_by_mark() -> dict[str, str]:
    """{mark: stream} of every modality."""
    return {MODALITIES[stream].mark: stream for stream in MODALITIES.names()}


def pieces(text: str) -> list[str]:
    """The text cut at its marks: text, mark, text, ..., mark, text. Text between marks may be empty."""
    return pattern(tuple(streams_by_mark())).split(text)


@functools.cache
def pattern(marks):
    """The regular expression of any of the marks."""
    return re.compile(f"({'|'.join(map(re.escape, marks))})")


def marked(text: str) -> list[str]:
    """The marks in a text, in order."""
    return pieces(text)[1::2]


def content_parts(text: str) -> list[dict]:
    """The text as the list of parts of a message: media where the text marks them, and the text around."""
    known = streams_by_mark()
    return [
        {"type": known[piece]} if piece in known else {"type": "text", "text": piece}
        for piece in pieces(text)
        if piece
    ]


def without_marks(text: str) -> str:
    """The text without its marks and the line breaks that set them apart."""
    for mark in dict.fromkeys(marked(text)):
        text = text.replace(mark + "\n", "").replace("\n" + mark, "").replace(mark, "").strip()
    return text


def without_breaks(text: str) -> str:
    """The text with its marks, but without the line breaks with which LLaVA's data set them apart."""
    for mark in dict.fromkeys(marked(text)):
        text = text.replace(mark + "\n", mark).replace("\n" + mark, mark).strip()
    return text


def check_marks(dialogue, interleaved):
    """Raises DataError unless a dialogue has a mark for each media item; messages may also have none.

    Where media stand among the text (`interleaved`), marks and media must have the same order too.
    """
    streams = streams_by_mark()
    found = [mark for _, text in dialogue.turns for mark in marked(text)]
    for mark, stream in streams.items():
        marks, items = found.count(mark), len(dialogue.of(stream))
        if marks != items and (dialogue.marked or found):
            marks_noun = "mark" if marks == 1 else "marks"
            files_noun = "file" if items == 1 else "files"
            raise DataError(
                f'{dialogue.where}: the text has {marks} {mark} {marks_noun} but "{stream}" lists {items} '
                f"{files_noun}. Add the missing file or remove a mark",
                "marks",
            )
    there, given = [streams[mark] for mark in found], [media.stream for media in dialogue.media]
    if interleaved and found and there != given:
        raise DataError(
            f"{dialogue.where}: the text marks {', '.join(there)}, the media are {', '.join(given)}. "
            "Give them in the order of their marks",
            "marks",
        )
