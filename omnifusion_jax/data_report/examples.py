"""Decoded examples: the pictures of a record, and its text as the model will see it."""

import base64
import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from omnifusion_jax.data.describe import runs
from omnifusion_jax.data.dialogues import IMAGE
from omnifusion_jax.data.images import open_image
from omnifusion_jax.data.reading import Reading
from omnifusion_jax.data_report.gather import USABLE, Gathered
from omnifusion_jax.errors import OmniFusionError

EACH = 3  # examples of a set
PICTURES = 4  # shown of a record
SIDE = 288  # pixels of a picture at most
LONGEST = 4000  # characters of a run of text


class Example(NamedTuple):
    """A record to show."""

    where: str
    pictures: list[str]  # data URLs
    runs: list[tuple[str, bool]]  # (text, whether it is a target)


def examples(data: Reading, tokenizer, gathered: Gathered) -> Iterator[tuple[str, list[Example]]]:
    """Yields (name, examples) of each set: usable records, evenly spaced."""
    for number, found in enumerate(gathered.found):
        usable = np.flatnonzero(found.records["state"] == USABLE)
        spread = np.linspace(0, len(usable) - 1, min(EACH, len(usable))).astype(int)
        shown = (example(data, tokenizer, number, int(i)) for i in usable[spread])
        yield found.name, [one for one in shown if one]


def example(data: Reading, tokenizer, number: int, i: int) -> Example | None:
    """The Example of record `i` of a set; None if it has become unusable meanwhile."""
    prepare = data.prepare.each[number]
    try:
        dialogue = data.source.sources[number][i]
        found = runs(prepare(dialogue), tokenizer, prepare.layout.vectors, prepare.layout.streams)
        pictures = [thumbnail(source, data) for source in dialogue.of(IMAGE)[:PICTURES]]
    except OmniFusionError:
        return None
    return Example(dialogue.where, pictures, [(text[:LONGEST], target) for text, target in found])


def thumbnail(source, data: Reading) -> str:
    """A small copy of a picture as the data URL of a JPEG file. Raises DataError."""
    processor = data.prepare.each[0].processors[IMAGE]
    picture, file = open_image(source, max_pixels=processor.max_pixels), io.BytesIO()
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
