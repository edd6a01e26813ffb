"""Asks a model the questions of a data set and counts the answers that it gives back exactly."""

import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import ROLES, Request
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


def questions(dialogue):
    """Every assistant turn of a dialogue as a question: the true turns before it, and the answer to give."""
    if unknown := {role for role, _ in dialogue.turns} - set(ROLES):
        raise DataError(f"{dialogue.where}: a turn is from {', '.join(sorted(unknown))}; known are {', '.join(ROLES)}")
    messages = [{"role": ROLES[role], "content": without_marks(text)} for role, text in dialogue.turns]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            yield Request(messages=messages[:i], images=list(dialogue.images)), message["content"]


def blank(image):
    """A black picture of the same size."""
    return Image.fromarray(np.zeros_like(np.asarray(open_image(image))))


def exact_match(model, source, count=0, *, batch_size=64, max_new_tokens=32, blind=False):
    """Greedy answers to the first `count` questions of a source (0: all of a finite one).

    Returns figures {"accuracy", "questions", and with `blind` "blind_accuracy"} and the list of Records. An answer counts when it equals the truth
    exactly, outer spaces aside. Raises DataError for a dialogue that cannot be used, or when there is no question.
    """
    dialogues = (source[i] for i in range(len(source)))
    asked = list(itertools.islice(itertools.chain.from_iterable(map(questions, dialogues)), count or None))
    if not asked:
        raise DataError("the evaluation data hold no question: an assistant's turn after a user's")
    requests, truths = [request for request, _ in asked], [truth for _, truth in asked]
    generation = GenerationConfig(max_new_tokens=max_new_tokens)
    answers = [a.text for a in model.generate(requests, generation, batch_size=batch_size)]
    dark = [None] * len(requests)
    if blind:
        blanks = [Request(messages=r.messages, images=[blank(image) for image in r.images]) for r in requests]
        dark = [a.text for a in model.generate(blanks, generation, batch_size=batch_size)]
    records = [
        Record(tuple(r.images), r.messages[-1]["content"], truth, answer, other)
        for r, truth, answer, other in zip(requests, truths, answers, dark, strict=True)
    ]
    figures = {"accuracy": sum(r.right for r in records) / len(records), "questions": len(records)}
    if blind:
        figures["blind_accuracy"] = sum(r.blind.strip() == r.truth.strip() for r in records) / len(records)
    return figures, records
