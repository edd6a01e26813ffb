"""Requests become batches of few shapes, so that programs compiled for one request serve the next."""

import numpy as np

from omnifusion_jax.batch import Sample, collate
from omnifusion_jax.data.dialogues import Request, from_request
from omnifusion_jax.data.images import fit, open_image
from omnifusion_jax.errors import DataError

STEP = 64  # lengths are rounded up to a multiple of this
HUMAN = ("human", "user")

BLANK = Sample(*(np.zeros(0, t) for t in (np.int32, np.int32, np.int32, np.float32)), np.zeros((0, 1, 1, 3), np.uint8))  # fills a batch


def bucket(length):
    """`length` rounded up to a multiple of STEP."""
    return -(-length // STEP) * STEP


def lay_out(request, where, layout, size, ask=None):
    """A Request to a Sample. `ask` None: the model is to speak next unless the assistant has the last turn.

    Raises DataError, which begins with `where`, for a picture that cannot be opened and a dialogue that cannot be laid out.
    """
    if not isinstance(request, Request):
        raise DataError(f"{where} is a {type(request).__name__}, not a Request")
    dialogue = from_request(request, where)
    try:
        pictures = [fit(open_image(source), size) for source in dialogue.images]
    except DataError as error:
        raise DataError(f"{dialogue.where}: {error}") from error
    ask = dialogue.turns[-1][0] in HUMAN if ask is None else ask
    return layout(dialogue, np.array(pictures, np.uint8).reshape(-1, size, size, 3), ask=ask)


def chunks(samples, batch_size):
    """Lists of at most `batch_size` keys of `samples` (a dict), longest samples first: neighbours need about the same room."""
    order = sorted(samples, key=lambda i: -len(samples[i].tokens))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def assemble(samples, size, left):
    """A Batch whose length is a multiple of STEP and whose rows are a power of two; blank rows fill it up."""
    rows = 1 << (len(samples) - 1).bit_length()
    length = bucket(max(len(sample.tokens) for sample in samples))
    return collate(samples + [BLANK] * (rows - len(samples)), length, max(len(s.images) for s in samples), size, left)
