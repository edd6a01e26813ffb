"""Asks a model the questions of a data set, and counts the answers that equal the truth exactly.

The layout "original" does not teach where an answer ends, so that a model talks until it is stopped. There an
answer is cut to as many tokens as the truth has, and the figure `cut_to_truth` says how many were longer.
"""

import collections
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.images import open_image
from omnifusion_jax.data.modality import without_marks
from omnifusion_jax.errors import DataError


class Record(NamedTuple):
    """One question, with what the model answered."""

    images: tuple
    question: str
    truth: str
    answer: str
    blind: str | None = None  # the answer to a blank picture; None: that was not asked

    @property
    def right(self) -> bool:
        return self.answer.strip() == self.truth.strip()


def questions(dialogue, layout):
    """Yields every assistant turn that follows a user's: (Request, question, truth).

    The Request holds the true turns before the answer, and the media that they show.
    """
    messages, turns = layout.messages(dialogue), layout.read(dialogue)
    placed = bool(shown(messages))  # otherwise all media belong to the first turn
    for i, (role, truth) in enumerate(turns):
        if role == "assistant" and i and turns[i - 1][0] == "user":
            asked = turns[i - 1][1] if layout.original else without_marks(turns[i - 1][1])
            items = shown(messages[:i]) if placed else None
            yield dialogue.request(messages[:i], items=items), asked, truth


def shown(messages: list[dict]) -> collections.Counter:
    """{stream: how many of its media items stand among the parts of the messages}"""
    parts = [
        part for message in messages if isinstance(message["content"], list) for part in message["content"]
    ]
    return collections.Counter(part["type"] for part in parts if part["type"] != "text")


def blank(image):
    """A black picture of the same size."""
    return Image.fromarray(np.zeros_like(np.asarray(open_image(image))))


def exact_match(model, source, count=0, *, batch_size=64, max_new_tokens=32, blind=False):
    """Asks the first `count` questions of a source (0: all of a finite one), and decodes greedily.

    An answer is right when it equals the truth exactly, apart from outer spaces.

    Args:
      model: an inference.model.Model.
      blind: ask every question about blank pictures too.
    Returns: (figures, [Record]). The figures are "accuracy", "questions", with `blind` "blind_accuracy", and
      "cut_to_truth" when the layout does not teach where an answer ends.
    Raises: DataError for a dialogue that cannot be used, or when there is no question.
    """
    layout, tokenizer = model.prepare.layout, model.tokenizer
    dialogues = (source[i] for i in range(len(source)))
    every = itertools.chain.from_iterable(questions(dialogue, layout) for dialogue in dialogues)
    asked = list(itertools.islice(every, count or None))
    if not asked:
        raise DataError("the evaluation data hold no question: an assistant's turn after a user's")
    requests, texts, truths = map(list, zip(*asked, strict=True))
    generation = GenerationConfig(max_new_tokens=max_new_tokens)
    lengths = [None] * len(requests)
    if layout.original:
        coded = [tokenizer.encode(truth) for truth in truths]
        truths = [tokenizer.decode(ids) for ids in coded]
        lengths = [len(ids) for ids in coded]

    def answer(requests):
        """(texts, how many of them were cut)"""
        found = [a.tokens for a in model.generate(requests, generation, batch_size=batch_size)]
        cut = sum(n is not None and len(tokens) > n for tokens, n in zip(found, lengths, strict=True))
        return [tokenizer.decode(tokens[:n]) for tokens, n in zip(found, lengths, strict=True)], cut

    answers, cut = answer(requests)
    dark = [None] * len(requests)
    if blind:
        blanks = [dataclasses.replace(r, images=list(map(blank, r.images))) for r in requests]
        dark, _ = answer(blanks)
    columns = zip(requests, texts, truths, answers, dark, strict=True)
    records = [Record(tuple(request.images), *rest) for request, *rest in columns]
    figures = {"accuracy": sum(r.right for r in records) / len(records), "questions": len(records)}
    if layout.original:
        figures["cut_to_truth"] = cut
    if blind:
        figures["blind_accuracy"] = sum(r.blind.strip() == r.truth.strip() for r in records) / len(records)
    return figures, records
