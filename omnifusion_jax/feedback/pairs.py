"""Pairs of answers from how many of their claims are refused; length tells nothing of what is better."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Rated(NamedTuple):
    """An answer, and how many of its claims the judge refused."""

    text: str
    refused: int


class Pair(NamedTuple):
    chosen: str
    rejected: str

    @property
    def longer(self) -> int:
        """By how many words the chosen answer is longer."""
        return len(self.chosen.split()) - len(self.rejected.split())


def candidates(answers: Iterable[Rated]) -> list[Pair]:
    """All pairs of different answers to a question of which one has fewer refused claims."""
    answers = dict.fromkeys(answers)
    both = itertools.permutations(answers, 2)
    return [Pair(a.text, b.text) for a, b in both if a.refused < b.refused and a.text != b.text]


def balanced(questions: Iterable[list[Pair]], most: int) -> Iterator[list[Pair]]:
    """At most `most` pairs of each question, by which lengths of chosen and rejected answers add up alike.

    Of the pairs of a question that one is taken each time which brings the sum of `longer`, over all pairs so
    far, closest to zero. When all that are left would drive it further away, they are left out.
    """
    lead = 0
    for pairs in questions:
        left, taken = list(pairs), []
        while left and len(taken) < most:
            best = min(left, key=lambda pair: (abs(lead + pair.longer), pair))
            left.remove(best)
            if lead * best.longer > 0:  # all that are left make it worse
                break
            lead += best.longer
            taken.append(best)
        yield taken
