"""What is learned of a dialogue that a chat template wrote.

turn     all that the template writes from where the model begins to speak to the end of its turn
omnilmm  the same without what follows the end of sequence, but for the last turn: OmniLMM's labels
ends     the end of sequence after each answer: it is put behind the last one, and behind others the first
         token of the next turn counts as it
minicpm  the same without a beginning-of-sequence token: the labels of MiniCPM-V's fine-tuning
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Rendered(NamedTuple):
    """A dialogue as tokens; all arrays are [n]."""

    ids: np.ndarray  # int32
    weights: np.ndarray  # float32: loss weight of the token as a target
    targets: np.ndarray  # int32: the token that counts as the target in its place, -1 for itself


def plain(ids, learned) -> Rendered:
    return Rendered(ids, learned.astype(np.float32), np.full(len(ids), -1, np.int32))


def turn(ids, answers: Sequence[np.ndarray], tokenizer) -> Rendered:
    """`answers` has bool[n] for each: which tokens the template writes for it."""
    return plain(ids, np.any([np.zeros(len(ids), bool), *answers], axis=0))


def omnilmm(ids, answers, tokenizer) -> Rendered:
    kept = []
    for answer in answers:
        ended = np.cumsum(answer & (ids == tokenizer.eos)) - (ids == tokenizer.eos) > 0
        kept.append(answer if answer[-1:].all() else answer & ~ended)
    return turn(ids, kept, tokenizer)


def ends(ids, answers, tokenizer) -> Rendered:
    last = bool(answers) and bool(answers[-1][-1])
    if last:
        ids = np.append(ids, np.int32(tokenizer.eos))
    found = turn(ids, [np.append(answer, False) if last else answer for answer in answers], tokenizer)
    for answer in answers:
        after = np.flatnonzero(answer)[-1:] + 1  # an answer of no tokens has no end either
        found.weights[after], found.targets[after] = 1, tokenizer.eos
    return found._replace(targets=np.where(found.targets == ids, -1, found.targets).astype(np.int32))


def minicpm(ids, answers, tokenizer) -> Rendered:
    found = ends(ids, answers, tokenizer)
    return Rendered(*(column[1:] for column in found)) if ids[0] == tokenizer.bos else found


LABELS = {"turn": turn, "omnilmm": omnilmm, "ends": ends, "minicpm": minicpm}
