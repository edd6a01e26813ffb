"""Requests become batches of few shapes, so that programs compiled for one request serve the next."""

import numpy as np

from omnifusion_jax.batch import Sample, collate
from omnifusion_jax.data.dialogues import Request, from_request
from omnifusion_jax.errors import DataError

STEP = 64  # lengths are rounded up to a multiple of this
HUMAN = ("human", "user")

BLANK = Sample(*(np.zeros(0, t) for t in (np.int32, np.int32, np.int32, np.float32)), {})  # fills a batch


def bucket(length):
    """`length` rounded up to a multiple of STEP."""
    return -(-length // STEP) * STEP


def lay_out(request, where, prepare, ask=None):
    """A Request to a Sample, by a data.layout.Prepare. `ask` None: the model is to speak next unless the assistant has the last turn.

    Raises DataError, which begins with `where`, for a picture that cannot be opened and a dialogue that cannot be laid out.
    """
    if not isinstance(request, Request):
        raise DataError(f"{where} is a {type(request).__name__}, not a Request")
    dialogue = from_request(request, where)
    return prepare(dialogue, ask=dialogue.turns[-1][0] in HUMAN if ask is None else ask)


def as_list(requests):
    """A Request alone is a list of one."""
    return [requests] if isinstance(requests, Request) else list(requests)


def chunks(samples, batch_size):
    """Lists of at most `batch_size` keys of `samples` (a dict), longest samples first: neighbours need about the same room."""
    order = sorted(samples, key=lambda i: -len(samples[i].tokens))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def assemble(samples, prepare, left, ways=1):
    """A Batch with room for the longest text, rounded up to a multiple of STEP; its rows are a power of two, blank ones fill it up.

    Rows that are to be spread `ways` ways are a multiple of that besides, and each way has a pool of media of its own.
    Where there are media, there is room for as many tiles and positions as an item may have at most: how many it has changes
    no shape.
    """
    rows = -(-(1 << (len(samples) - 1).bit_length()) // ways) * ways
    items = max(s.items for s in samples)
    processors = prepare.processors.values()
    length = bucket(max(len(s.tokens) - s.media_positions for s in samples)) + items * max(
        (processor.positions for processor in processors), default=0
    )
    usual = items * max((processor.room for processor in processors), default=0)
    return collate(samples + [BLANK] * (rows - len(samples)), length, prepare.tiles, ways, usual, left)
