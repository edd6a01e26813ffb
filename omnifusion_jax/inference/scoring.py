"""How likely given answers are. The prompt is read once, and the answers then follow it several at a time."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.batch import INSTEAD, Batch, Sample
from omnifusion_jax.data.dialogues import Request, from_request
from omnifusion_jax.data.layout import ANSWER, Prepare
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.engine.programs import columns, held
from omnifusion_jax.nn.attend import AttentionSpec, Places

LEAST = 8  # columns of an answer that there is room for; more are powers of two


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a given answer is. Logarithms are natural, and by the model's own distribution."""

    logprob: float  # sum over the tokens, what ends the answer included
    mean: float  # over the tokens
    tokens: list[int]
    logprobs: list[float]  # of each token


def lay_out(
    request: Request, candidates: Sequence[str], where: str, prepare: Prepare
) -> tuple[Sample, list[Sample]]:
    """The Sample of a question, and that of the dialogue with each candidate as its answer.

    Raises:
      DataError: the question or a candidate cannot be laid out, or is too long.
    """
    if isinstance(candidates, str):
        raise DataError(f"{where}: candidates are one string, {candidates!r:.80}. Give a list of strings")
    dialogue = from_request(request, where)
    prepared = prepare.media(dialogue)
    found = []
    for i, text in enumerate(candidates):
        here = f"{where}, candidate {i}"
        if not isinstance(text, str):
            raise DataError(f"{here} is a {type(text).__name__}, not a string")
        turns = (*dialogue.turns, (ANSWER, text))
        answered = dataclasses.replace(dialogue, where=here, turns=turns)
        sample = prepare.layout.sample(answered, prepared, ask=False)  # whole, where training may cut it off
        n, most = len(sample.tokens), prepare.layout.max_length
        if n > most:
            raise DataError(
                f"{here}: {n} tokens exceed the model's {most}. Shorten the dialogue or the answer",
                "too_long",
            )
        found.append(sample)
    return prepare.layout(dialogue, prepared, ask=True), found


class Rest:
    """What follows the beginning that a question and the dialogues with an answer have in common."""

    def __init__(self, question: Sample, answered: Sequence[Sample]):
        same = [common(question, sample) for sample in answered]
        self.start = min(same) - 1  # the column that predicts what comes first after the beginning
        # [n, size]: tokens from there on, and those that follow each of them
        self.size = max(LEAST, 1 << (max(len(s.tokens) for s in answered) - self.start - 2).bit_length())
        self.tokens, self.targets = np.zeros((2, len(answered), self.size), np.int32)
        self.places = []  # columns of each row that predict a token of its answer
        for row, (sample, n) in enumerate(zip(answered, same, strict=True)):
            targets = np.where(sample.kind == INSTEAD, sample.index, sample.tokens)[self.start + 1 :]
            self.tokens[row, : len(targets)] = sample.tokens[self.start : -1]
            self.targets[row, : len(targets)] = targets
            self.places.append(n + np.flatnonzero(sample.weights[n:]) - self.start - 1)

    def score(self, row: int, logprobs: np.ndarray) -> Score:
        """The Score of an answer, by the log probabilities float32[size] of all targets of its row."""
        found = logprobs[self.places[row]]
        total = float(np.sum(found, dtype=np.float64))
        return Score(total, total / len(found), self.targets[row, self.places[row]].tolist(), found.tolist())


def common(one: Sample, other: Sample) -> int:
    """How many positions two Samples that show the same media have in common at their beginning."""
    n = min(len(one.tokens), len(other.tokens))
    apart = np.any([a[:n] != b[:n] for a, b in zip(one[:3], other[:3], strict=True)], axis=0)
    return int(apart.argmax()) if apart.any() else n


@partial(jax.jit, static_argnames="room")
def read(module, batch: Batch, at, room: int):
    """Reads the first row of a Batch, of whose columns those before `at` count.

    Returns its cache, [1, kv_heads, seq + room, head_dim] in each layer, and the embedding [1, width] of the
    column `at`.
    """
    x = module.embed(batch)[:1]  # [1, seq, width]
    cache = module.decoder.init_cache(1, x.shape[1] + room, x.dtype)
    query = Places(batch.segments[:1], batch.positions[:1])
    spec = AttentionSpec(
        query, held(columns(cache), jnp.full(1, x.shape[1] - 1)), module.decoder.config.window
    )
    _, cache = module.decoder(x, spec, cache, jnp.zeros(1, jnp.int32))
    return cache, x[:, at]


@jax.jit
def follow(decoder, cache, first, at, tokens, targets):
    """Log probabilities float32[n, size] of targets int32[n, size] by what stands before each.

    tokens int32[n, size] follow the columns before `at` of the one row of the cache; `first` [1, width]
    stands for the first of each row.
    """
    n, size = tokens.shape
    cache = jax.tree.map(lambda a: jnp.broadcast_to(a, (n, *a.shape[1:])), cache)
    x = decoder.embed_tokens(tokens).at[:, 0].set(first)  # [n, size, width]
    positions = jnp.broadcast_to(at + jnp.arange(size), (n, size))
    query = Places(jnp.ones_like(positions), positions)
    spec = AttentionSpec(query, held(columns(cache), positions[:, -1]), decoder.config.window)
    hidden, _ = decoder(x, spec, cache, positions[:, 0])
    logits = decoder.logits(hidden)  # [n, size, vocab]
    found = jnp.take_along_axis(logits, targets[..., None], axis=2)[..., 0]
    return found - jax.nn.logsumexp(logits, axis=2)
