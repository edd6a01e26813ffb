"""Two answers to one question, of which the first is preferred, as one Sample of two dialogues.

Both show the same media, which are encoded once:

    question | chosen answer | question | rejected answer
    1 1 1 1    1 1 1 1 1 1     2 2 2 2    2 2 2 2 2           segments
    . . . .    T T T T T T     . . . .    T T T T T           targets
    . . . .    . T T . . .     . . . .    . T T T .           extra[CHANGED]: one was put for the other
"""

import dataclasses
import difflib
from collections.abc import Sequence

import numpy as np

from omnifusion_jax.batch import Sample
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.errors import DataError

CHANGED = "changed"  # a column of Sample.extra
KEPT = 3  # tokens that both answers have in a row, so that they count as unchanged


def pair(layout, dialogue: Dialogue, prepared: Sequence) -> Sample:
    """The Sample of both answers to the last question of a dialogue, the chosen one first.

    Targets are those of the last answers alone: what was said before is the same in both.

    Args:
      layout: a data.layout.Layout.
      prepared: as there.
    Raises: DataError when the dialogue does not suit the layout, there is no rejected answer, both are the
      same in tokens, or one is too long.
    """
    where = dialogue.where
    if dialogue.rejected is None:
        raise DataError(
            f"{where}: there is one answer, and two are compared. Give 'chosen' and 'rejected', "
            "or train with objective=answers",
            "no_pair",
        )
    (role, _), before = dialogue.turns[-1], dialogue.turns[:-1]
    other = dataclasses.replace(dialogue, turns=(*before, (role, dialogue.rejected)), rejected=None)
    both = [layout(one, prepared) for one in (dialogue, other)]
    for sample, name in zip(both, ("chosen", "rejected"), strict=True):
        if sample.cut or (layout.original and len(sample.tokens) == layout.max_length):
            raise DataError(
                f"{where}: with its {name} answer it has more tokens than max_length, {layout.max_length}, "
                "and an answer that is compared is not cut. Shorten it, or raise data.max_length",
                "too_long",
            )
    chosen, rejected = both
    if np.array_equal(chosen.tokens, rejected.tokens):
        raise DataError(
            f"{where}: chosen and rejected are the same in tokens. Remove the pair, or correct an answer",
            "same",
        )
    joined = (np.concatenate(columns) for columns in zip(*(sample[:3] for sample in both), strict=True))
    return Sample(
        *joined,
        weights=np.concatenate([last_run(sample.weights) for sample in both]),
        media=chosen.media,
        items=chosen.items,
        media_positions=chosen.media_positions + rejected.media_positions,
        parts=(len(chosen.tokens), len(rejected.tokens)),
        extra={CHANGED: np.concatenate(changed(chosen.tokens, rejected.tokens))},
    )


def last_run(weights: np.ndarray) -> np.ndarray:
    """Loss weights [n] without those before the last unbroken run of targets."""
    targets = np.flatnonzero(weights)
    breaks = np.flatnonzero(np.diff(targets) > 1)
    begins = targets[breaks[-1] + 1] if len(breaks) else 0
    return np.where(np.arange(len(weights)) >= begins, weights, 0).astype(np.float32)


def changed(chosen: np.ndarray, rejected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens of two sequences, int32[n] and int32[m], stand in place of others: float32, 1 or 0.

    As the published code of RLHF-V does it (arXiv 2312.00849), the sequences without their first token are
    matched by difflib. Matches shorter than KEPT tokens do not count. Between two that do, tokens are changed
    if both sequences have some there; what one of them merely has more is not.
    """
    found = np.zeros(len(chosen), np.float32), np.zeros(len(rejected), np.float32)
    matcher = difflib.SequenceMatcher(None, rejected[1:].tolist(), chosen[1:].tolist())
    theirs = ours = 1  # where the next gap begins, in the rejected and in the chosen sequence
    for a, b, size in matcher.get_matching_blocks():
        if 0 < size < KEPT:
            continue
        a, b = a + 1, b + 1
        if theirs < a and ours < b:
            found[0][ours:b] = found[1][theirs:a] = 1
        theirs, ours = a + size, b + size
    return found
