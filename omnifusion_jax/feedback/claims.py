"""What an answer claims, one thing at a time, as questions that can be answered with yes or no."""

import re
from collections.abc import Callable
from typing import NamedTuple

END = re.compile(r"(?<=[.!?;])\s+|(?<=[。！？；])|\n+")  # of a sentence, in Chinese too
# what a model of language is asked; the answer has a claim and its question on a line, with | between them
ASK = """Split the text into the single facts that it states about a picture, and turn each of them into a \
question whose answer is yes if the fact is true. Write one fact a line, as FACT | QUESTION. Leave out \
opinions and what no picture can show.

Text: {answer}"""


class Claim(NamedTuple):
    """A fact that an answer states, and the question whether it is so."""

    text: str
    question: str


def sentences(question: str) -> Callable[[str], list[Claim]]:
    """The splitter that takes every sentence for a claim. `question` asks for one, with {claim} in it."""

    def split(answer: str) -> list[Claim]:
        found = [piece.strip() for piece in END.split(answer)]
        return [
            Claim(piece, question.replace("{claim}", piece)) for piece in found if re.search(r"\w", piece)
        ]

    return split


def by_model(ask: Callable[[str], str]) -> Callable[[str], list[Claim]]:
    """The splitter that has a model of language do it; `ask` gives its answer to a text.

    Lines that are not as asked for are left out: a claim that nobody can judge says nothing of an answer.
    """

    def split(answer: str) -> list[Claim]:
        lines = [line.split("|") for line in ask(ASK.replace("{answer}", answer)).splitlines()]
        pairs = [tuple(part.strip(" -*\t") for part in parts) for parts in lines if len(parts) == 2]
        return [Claim(*pair) for pair in pairs if all(pair)]

    return split
