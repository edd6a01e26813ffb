"""One sample in words, as the model will see it."""

import itertools

import numpy as np

from omnifusion_jax.batch import FEATURE, SPECIAL, TEXT, UNKNOWN
from omnifusion_jax.errors import OmniFusionError

TRIED = 100  # samples


def describe(source, prepare, tokenizer):
    """The first sample that can be used, its targets in [[ ]], its feature rows counted."""
    for i in range(min(len(source), TRIED)):
        try:
            return render(prepare(source[i]), tokenizer, prepare.layout.vectors, prepare.layout.streams)
        except OmniFusionError as error:
            problem = error  # a bad sample is the pipeline's business
    return f"None of the first samples can be used, the last because {problem}"


def render(sample, tokenizer, special, streams):
    """The positions of a Sample, run by run of one kind."""
    lines = (sample.kind == SPECIAL) & (
        sample.index == (special.index("newline") if "newline" in special else -1)
    )
    kinds = np.where(
        lines, FEATURE + streams.index("image"), sample.kind
    )  # the ends of a picture's lines belong to it
    kinds = np.where(kinds == UNKNOWN, TEXT, kinds)
    marks = np.stack([kinds, sample.weights > 0])
    starts = [0, *(np.flatnonzero((marks[:, 1:] != marks[:, :-1]).any(axis=0)) + 1), len(sample.tokens)]
    words = []
    for start, end in itertools.pairwise(starts):
        kind, target = kinds[start], sample.weights[start] > 0
        if kind == TEXT:
            text = tokenizer.decode(sample.tokens[start:end]) + (
                "</s>" if sample.tokens[end - 1] == tokenizer.eos else ""
            )
            words.append(f"[[{text}]]" if target else text)
        elif kind == SPECIAL:
            words += [f"<{special[i].upper()}>" for i in sample.index[start:end]]
        elif kind >= FEATURE:
            ends = lines[start:end].sum()
            words.append(
                f"<{end - start - ends} {streams[kind - FEATURE]} features{f' and {ends} ends of lines' if ends else ''}>"
            )
    return " ".join(words)
