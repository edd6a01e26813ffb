"""Writes a sample out as text, the way the model will see it."""

import itertools

import numpy as np

from omnifusion_jax.batch import FEATURE, INSTEAD, SPECIAL, TEXT, UNKNOWN
from omnifusion_jax.errors import OmniFusionError

TRIED = 100  # samples


def describe(source, prepare, tokenizer) -> str:
    """Describes the first usable sample: targets stand in [[ ]], and runs of feature rows are counted."""
    problem = "there are none"
    for i in range(min(len(source), TRIED)):
        try:
            return render(prepare(source[i]), tokenizer, prepare.layout.vectors, prepare.layout.streams)
        except OmniFusionError as error:
            problem = error  # the pipeline deals with bad samples
    return f"None of the first samples can be used: {problem}"


def render(sample, tokenizer, special, streams) -> str:
    """The positions of a Sample as text, with its targets in [[ ]]; arguments as in `runs`."""
    found = runs(sample, tokenizer, special, streams)
    return " ".join(f"[[{text}]]" if target else text for text, target in found)


def runs(sample, tokenizer, special, streams) -> list[tuple[str, bool]]:
    """The positions of a Sample as (text, whether it is a target), a pair for each run of one kind.

    `special` and `streams` are the names that `sample.index` and `sample.kind` refer to.
    """
    newline = special.index("newline") if "newline" in special else -1
    lines = (sample.kind == SPECIAL) & (sample.index == newline)
    before = np.maximum.accumulate(np.where(lines, 0, np.arange(len(lines))))
    kinds = sample.kind[before]  # an end of a line belongs to the media item before it
    kinds = np.where(kinds == UNKNOWN, TEXT, kinds)
    marks = np.stack([kinds, sample.weights > 0])
    starts = [0, *(np.flatnonzero((marks[:, 1:] != marks[:, :-1]).any(axis=0)) + 1), len(sample.tokens)]
    found = []
    for start, end in itertools.pairwise(starts):
        kind, target = kinds[start], sample.weights[start] > 0
        if kind == TEXT:
            text = tokenizer.decode(sample.tokens[start:end])
            if sample.tokens[end - 1] == tokenizer.eos:
                text += "</s>"
            found.append((text, bool(target)))
        elif kind == INSTEAD:
            counts = tokenizer.backend.id_to_token(int(sample.index[start]))
            found.append(
                (f"{tokenizer.decode(sample.tokens[start:end])} (learned as {counts})", bool(target))
            )
        elif kind == SPECIAL:
            found += [(f"<{special[i].upper()}>", False) for i in sample.index[start:end]]
        elif kind >= FEATURE:
            ends = lines[start:end].sum()
            newlines = f" and {ends} ends of lines" if ends else ""
            found.append((f"<{end - start - ends} {streams[kind - FEATURE]} features{newlines}>", False))
    return found
