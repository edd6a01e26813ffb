"""Turns requests into batches of few shapes, so that programs compiled for one request serve the next."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from omnifusion_jax.batch import Batch, Sample, collate
from omnifusion_jax.data.dialogues import Request, from_request
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.errors import DataError

STEP = 64  # lengths are rounded up to a multiple of this
HUMAN = ("human", "user")

# A sample without tokens, which fills a batch up
BLANK = Sample(*(np.zeros(0, t) for t in (np.int32, np.int32, np.int32, np.float32)), {})


class Question(NamedTuple):
    """A request that is laid out up to where its answer begins. It can be made in a worker process."""

    name: int | str  # what its random draws follow from, see `name_of`
    sample: Sample


def name_of(request: Request, number: int) -> int | str:
    """The id of a Request, or its number in the list that it is in."""
    return number if request.id is None else str(request.id)


def bucket(length: int) -> int:
    """`length` rounded up to a multiple of STEP."""
    return -(-length // STEP) * STEP


def lay_out(request: Request, where: str, prepare: Prepare, ask: bool | None = None) -> Sample:
    """The Sample of a Request.

    `ask` says whether the model speaks next; None: it does unless the assistant has the last turn.

    Raises:
      DataError: a picture cannot be opened or the dialogue cannot be laid out. The message begins with
        `where`.
    """
    if not isinstance(request, Request):
        raise DataError(f"{where} is a {type(request).__name__}, not a Request")
    dialogue = from_request(request, where)
    return prepare(dialogue, ask=dialogue.turns[-1][0] in HUMAN if ask is None else ask)


def question(request: Request, where: str, prepare: Prepare, new: int) -> Sample:
    """The Sample of a Request, which ends where an answer of up to `new` tokens begins.

    Raises:
      DataError: as `lay_out` does, or the model has no room for the answer.
    """
    sample = lay_out(request, where, prepare, ask=True)
    length, most = len(sample.tokens), prepare.layout.max_length
    if length + new > most:
        raise DataError(
            f"{where}: {length} tokens and max_new_tokens {new} exceed the model's {most}. "
            "Shorten the dialogue or the answer",
            "too_long",
        )
    return sample


def as_list(requests: Request | Iterable[Request]) -> list[Request]:
    """Requests as a list; a single Request becomes a list of one."""
    return [requests] if isinstance(requests, Request) else list(requests)


def chunks(samples: Mapping[int, Sample], batch_size: int) -> list[list[int]]:
    """Lists of at most `batch_size` keys of `samples`.

    The longest samples come first, so that those of one list need about the same room.
    """
    order = sorted(samples, key=lambda i: -len(samples[i].tokens))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def assemble(samples: list[Sample], prepare: Prepare, ways: int = 1) -> Batch:
    """A Batch of samples, padded on the right.

    Its length has room for the longest text, rounded up to a multiple of STEP. Its number of rows is a
    power of two, rounded up to a multiple of `ways`, the number of pieces that the rows are spread over;
    blank rows fill it up, and each piece has its own pool of media. For each media item there is room for
    the largest number of tiles and positions that an item may have, so the shapes do not depend on how many
    it has.
    """
    power = 1 << (len(samples) - 1).bit_length()
    rows = -(-power // ways) * ways
    items = max(s.items for s in samples)
    processors = prepare.processors.values()
    text = bucket(max(len(s.tokens) - s.media_positions for s in samples))
    length = text + items * max((processor.positions for processor in processors), default=0)
    usual = items * max((processor.room for processor in processors), default=0)
    return collate(samples + [BLANK] * (rows - len(samples)), length, prepare.tiles, ways, usual)
