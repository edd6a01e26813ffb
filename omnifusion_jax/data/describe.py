"""One sample in words, as the model will see it."""

import itertools

import numpy as np

from omnifusion_jax.batch import FEATURE, SPECIAL, TEXT
from omnifusion_jax.errors import OmniFusionError

TRIED = 100  # samples


def describe(source, prepare, tokenizer):
    """The first sample that can be used, its targets in [[ ]], its feature slots counted."""
    for i in range(min(len(source), TRIED)):
        try:
            return render(prepare(source[i]), tokenizer, prepare.layout.config.special)
        except OmniFusionError as error:
            problem = error  # a bad sample is the pipeline's business
    return f"None of the first samples can be used, the last because {problem}"


def render(sample, tokenizer, special):
    """The positions of a Sample, run by run of one kind."""
    marks = np.stack([sample.kind, sample.weights > 0])
    starts = [0, *(np.flatnonzero((marks[:, 1:] != marks[:, :-1]).any(axis=0)) + 1), len(sample.tokens)]
    words = []
    for start, end in itertools.pairwise(starts):
        kind, target = sample.kind[start], sample.weights[start] > 0
        if kind == TEXT:
            text = tokenizer.decode(sample.tokens[start:end]) + ("</s>" if sample.tokens[end - 1] == tokenizer.eos else "")
            words.append(f"[[{text}]]" if target else text)
        elif kind == SPECIAL:
            words += [f"<{special[i].upper()}>" for i in sample.index[start:end]]
        elif kind == FEATURE:
            words.append(f"<{end - start} image features>")
    return " ".join(words)
