"""How far apart two models are that read the same tokens: their distributions, and what they answer."""

import itertools
from collections.abc import Iterator

import numpy as np

from omnifusion_jax.config import GenerationConfig, check
from omnifusion_jax.data.sources import Source
from omnifusion_jax.errors import DataError
from omnifusion_jax.evaluation.exact_match import questions
from omnifusion_jax.inference import prompts
from omnifusion_jax.inference.model import Model
from omnifusion_jax.models.answering import weighed

BATCH = 4  # dialogues whose logits are in memory at a time


def compare(
    one: Model,
    other: Model,
    source: Source,
    count: int = 0,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 32,
) -> dict[str, float]:
    """Compares the models on the first `count` dialogues of a source (0: all of a finite one).

    Returns:
      kl, kl_99: Kullback-Leibler divergence from `one` to `other` in nats, KL(one || other), of the next
        token where it is part of an answer: the mean and the 99th percentile of all such positions.
      top_1: share of these positions where the likeliest token is the same.
      positions: their number.
      answers: share of the questions to which both give the same tokens, greedily.
      questions: their number.
      bytes, bytes_other: of the parameters, as they are kept.
    Raises:
      ConfigError: the models do not read the same tokens.
      DataError: a dialogue cannot be used, or there is none.
    """
    check(
        one.tokenizer.digest == other.tokenizer.digest and one.config.layout == other.config.layout,
        "the models have other tokenizers or layouts, so that their distributions cannot be compared",
    )
    dialogues = list(itertools.islice((source[i] for i in range(len(source))), count or None))
    found = [figures for some in chunked(dialogues) for figures in divergences(one, other, some)]
    asked = [request for d in dialogues for request, _, _ in questions(d, one.prepare.layout)]
    if not (found and asked):
        raise DataError("the data hold no answer: an assistant's turn after a user's")
    kl, same = (np.concatenate(column) for column in zip(*found, strict=True))
    greedy = GenerationConfig(max_new_tokens=max_new_tokens)
    answers = [[a.tokens for a in m.generate(asked, greedy, batch_size=batch_size)] for m in (one, other)]
    equal = [a == b for a, b in zip(*answers, strict=True)]
    return {
        "kl": kl.mean().item(),
        "kl_99": np.quantile(kl, 0.99).item(),
        "top_1": same.mean().item(),
        "positions": len(kl),
        "answers": sum(equal) / len(equal),
        "questions": len(equal),
        "bytes": sum(weighed(one.module).values()),
        "bytes_other": sum(weighed(other.module).values()),
    }


def chunked(dialogues: list) -> Iterator[list]:
    return (dialogues[i : i + BATCH] for i in range(0, len(dialogues), BATCH))


def divergences(one: Model, other: Model, dialogues: list) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each dialogue (divergence float64[n], whether the likeliest is the same bool[n]) at its targets."""
    layout = one.prepare.layout
    requests = [dialogue.request(layout.messages(dialogue)) for dialogue in dialogues]
    samples = [prompts.lay_out(r, d.where, one.prepare) for r, d in zip(requests, dialogues, strict=True)]
    pairs = zip(*(model.logits(requests, batch_size=BATCH) for model in (one, other)), strict=True)
    for sample, (ours, theirs) in zip(samples, pairs, strict=True):
        before = np.flatnonzero(sample.weights[1:])  # the positions that predict a target
        p, q = log_softmax(ours[before]), log_softmax(theirs[before])
        yield (np.exp(p) * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64 logarithms of the probabilities, over the last dimension."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
