"""Asks a model the questions of a data set and counts the answers that it gives back exactly.

A layout that teaches no end of an answer ("original") leaves a model talking until it is stopped. There an
answer is cut to as many tokens as the truth has, and the figure `cut_to_truth` says how many answers went on.
"""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.images import open_image
from omnifusion_jax.data.layout import without_marks
from omnifusion_jax.errors import DataError


class Record(NamedTuple):
    """One question with what the model said; `blind` is what it said to a blank picture, None where that was not asked."""

    images: tuple
    question: str
    truth: str
    answer: str
    blind: str | None = None

    @property
    def right(self):
        return self.answer.strip() == self.truth.strip()


def questions(dialogue, layout):
    """Every assistant turn after a user's as (Request of the true turns before it, question, truth)."""
    messages, turns = layout.messages(dialogue), layout.read(dialogue)
    shown = sum(
        pictures(message) for message in messages
    )  # those that stand at their turns; else all belong to the first
    for i, (role, truth) in enumerate(turns):
        if role == "assistant" and i and turns[i - 1][0] == "user":
            count = sum(pictures(message) for message in messages[:i]) if shown else len(dialogue.images)
            asked = turns[i - 1][1] if layout.original else without_marks(turns[i - 1][1])
            yield Request(messages=messages[:i], images=list(dialogue.images[:count])), asked, truth


def pictures(message):
    """How many the parts of a message show."""
    return (
        sum(part["type"] == "image" for part in message["content"])
        if isinstance(message["content"], list)
        else 0
    )


def blank(image):
    """A black picture of the same size."""
    return Image.fromarray(np.zeros_like(np.asarray(open_image(image))))


def exact_match(model, source, count=0, *, batch_size=64, max_new_tokens=32, blind=False):
    """Greedy answers to the first `count` questions of a source (0: all of a finite one).

    Returns figures {"accuracy", "questions", with `blind` "blind_accuracy", and "cut_to_truth" where the
    layout teaches no end} and the list of Records. An answer counts when it equals the truth exactly, outer
    spaces aside. Raises DataError for a dialogue that cannot be used, or when there is no question.
    """
    layout, tokenizer = model.prepare.layout, model.tokenizer
    dialogues = (source[i] for i in range(len(source)))
    asked = list(
        itertools.islice(
            itertools.chain.from_iterable(questions(d, layout) for d in dialogues), count or None
        )
    )
    if not asked:
        raise DataError("the evaluation data hold no question: an assistant's turn after a user's")
    requests, texts, truths = map(list, zip(*asked, strict=True))
    generation = GenerationConfig(max_new_tokens=max_new_tokens)
    lengths = [None] * len(requests)
    if layout.original:
        coded = [tokenizer.encode(truth) for truth in truths]
        truths, lengths = [tokenizer.decode(ids) for ids in coded], list(map(len, coded))

    def answer(requests):
        answers = [a.tokens for a in model.generate(requests, generation, batch_size=batch_size)]
        cut = sum(n is not None and len(tokens) > n for tokens, n in zip(answers, lengths, strict=True))
        return [tokenizer.decode(tokens[:n]) for tokens, n in zip(answers, lengths, strict=True)], cut

    (answers, cut), dark = answer(requests), [None] * len(requests)
    if blind:
        dark, _ = answer(
            [Request(messages=r.messages, images=[blank(image) for image in r.images]) for r in requests]
        )
    columns = zip(requests, texts, truths, answers, dark, strict=True)
    records = [
        Record(tuple(r.images), text, truth, answer, other) for r, text, truth, answer, other in columns
    ]
    figures = {"accuracy": sum(r.right for r in records) / len(records), "questions": len(records)}
    if layout.original:
        figures["cut_to_truth"] = cut
    if blind:
        figures["blind_accuracy"] = sum(r.blind.strip() == r.truth.strip() for r in records) / len(records)
    return figures, records
