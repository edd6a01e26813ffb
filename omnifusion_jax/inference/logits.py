"""What may come next: scores over the vocabulary, bent by the rules of a GenerationConfig.

Every processor is a pure function of float32[rows, vocab] and equals its namesake in transformers 5 (generation/logits_process.py). What they know of
the text is what was generated, `tokens[:, :length]` of int32[rows, room]; the prompt is not looked at, as with Hugging Face's `inputs_embeds`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.config import check

ANY = -1  # fills the banned table on the left: matches whatever was generated, and nothing at all


@dataclasses.dataclass(frozen=True)
class Rules:
    """What of a GenerationConfig, in the terms of one vocabulary, the sampler is compiled for."""

    eos: int
    pad: int
    room: int  # tokens there is space for; how many may be generated is a knob
    num_beams: int = 1
    sample: bool = False
    top_k: int = 0
    nucleus: bool = False
    penalised: bool = False
    no_repeat_ngram_size: int = 0
    banned: tuple[tuple[int, ...], ...] = ()
    forced_eos: bool = False


class Knobs(NamedTuple):
    """What of a GenerationConfig changes from call to call without a new program."""

    limit: jax.Array  # int32[]: tokens there may be at most
    seed: jax.Array  # uint32[]
    temperature: jax.Array  # float32[]
    rest: jax.Array  # float32[]: 1 - top_p
    penalty: jax.Array  # float32[]: of repetition
    early_stopping: jax.Array  # bool[]
    norm: jax.Array  # float32[room]: what a beam's score is divided by when it has 1, 2, 3... tokens


def rules(g, tokenizer, vocab, room):
    """The Rules for a GenerationConfig with space for `room` tokens. Raises ConfigError for a ban on tokens outside of `vocab`.

    Banned strings are cut as the published recipe did, `tokenizer(word, add_special_tokens=False)`. A ban on the bare end-of-sequence token is
    dropped, as Hugging Face drops it.
    """
    bans = [(word, tuple(tokenizer.encode(word))) for word in g.banned]
    bans += [(ids, tuple(ids)) for ids in g.banned_tokens]
    if g.ban_newline:
        bans.append(("\n", tuple(tokenizer.encode("\n")[-1:])))
    for source, ids in bans:
        check(len(ids) > 0, f"generation bans {source!r}, which is no token at all")
        check(
            all(0 <= i < vocab for i in ids),
            f"generation bans {source!r}, tokens {list(ids)}, but the model knows 0 to {vocab - 1} only",
        )
    return Rules(
        eos=tokenizer.eos,
        pad=tokenizer.pad,
        room=room,
        num_beams=g.num_beams,
        sample=g.temperature > 0,
        top_k=g.top_k,
        nucleus=g.top_p < 1,
        penalised=g.repetition_penalty != 1,
        no_repeat_ngram_size=g.no_repeat_ngram_size,
        banned=tuple(dict.fromkeys(ids for _, ids in bans if ids != (tokenizer.eos,))),
        forced_eos=g.forced_eos,
    )


def knobs(g, room):
    """The Knobs for a GenerationConfig, NumPy. What is compared or divided by is made in double precision, as in Python."""
    norm = np.arange(1.0, room + 1) ** g.length_penalty
    numbers = np.float32(g.temperature), np.float32(1 - g.top_p), np.float32(g.repetition_penalty)
    return Knobs(
        np.int32(g.max_new_tokens),
        np.uint32(g.seed),
        *numbers,
        np.bool_(g.early_stopping),
        norm.astype(np.float32),
    )


def process(scores, tokens, length, knobs, rules):
    """All processors in Hugging Face's order; `length` tokens are there."""
    if rules.penalised:
        scores = penalise(scores, tokens, length, knobs.penalty)
    if rules.no_repeat_ngram_size:
        scores = no_repeat_ngram(scores, tokens, length, rules.no_repeat_ngram_size)
    if rules.banned:
        scores = no_banned(scores, tokens, length, rules.banned)
    if rules.forced_eos:
        scores = force(scores, rules.eos, length == knobs.limit - 1)
    scores = finite(scores)
    if rules.sample:
        scores = scores / knobs.temperature
        scores = top_k(scores, rules.top_k) if rules.top_k else scores
        scores = top_p(scores, knobs.rest) if rules.nucleus else scores
    return scores


def forbid(scores, tokens, hit):
    """Minus infinity at `scores[row, tokens[row, i]]` wherever `hit[row, i]`."""
    rows = jnp.arange(len(scores))[:, None]
    return jnp.where(jnp.zeros(scores.shape, bool).at[rows, tokens].max(hit), -jnp.inf, scores)


def penalise(scores, tokens, length, penalty):
    """Makes tokens that are there already less likely: positive scores are divided by `penalty`, negative ones
    multiplied (arXiv 1909.05858).

    transformers 5 leaves out as many of a row's first tokens as padding stands before its prompt, though they
    are no part of it; here none is.
    """
    there = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < length, tokens.shape)
    seen = jnp.zeros(scores.shape, bool).at[jnp.arange(len(scores))[:, None], tokens].max(there)
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(scores, tokens, length, n):
    """Forbids every token that would end an n-gram which is there already."""
    count = tokens.shape[1] - n + 1
    if count < 1:
        return scores
    windows = jnp.stack([tokens[:, i : i + count] for i in range(n)], axis=-1)  # [rows, count, n]
    ending = jax.lax.dynamic_slice_in_dim(
        tokens, length - (n - 1), n - 1, axis=1
    )  # clamped where there is no window yet
    hit = (windows[..., :-1] == ending[:, None]).all(-1) & (jnp.arange(count) + n <= length)
    return forbid(scores, windows[..., -1], hit)


def no_banned(scores, tokens, length, banned):
    """Forbids the last token of each sequence of `banned` wherever the others stand just before it."""
    width = max(map(len, banned)) - 1
    prefixes = np.array([(ANY,) * (width + 1 - len(ids)) + ids[:-1] for ids in banned], np.int32).reshape(
        len(banned), width
    )
    last = np.array([ids[-1] for ids in banned], np.int32)
    at = length - width + jnp.arange(width)
    ending = jnp.where(
        at >= 0, tokens[:, jnp.maximum(at, 0)], ANY - 1
    )  # what is not there yet equals no token
    hit = ((prefixes == ANY) | (prefixes == ending[:, None])).all(-1)  # [rows, sequences]
    return forbid(scores, jnp.broadcast_to(last, hit.shape), hit)


def force(scores, token, now):
    """Only `token` may come `now`; its score is 0, so that a beam pays nothing for it."""
    only = jnp.where(jnp.arange(scores.shape[1]) == token, 0.0, -jnp.inf)
    return jnp.where(now, only, scores)


def finite(scores):
    """NaN to 0, infinities to the largest and smallest finite number."""
    return jnp.nan_to_num(scores, nan=0.0)


def top_k(scores, k):
    """Forbids what scores less than the k-th best; what ties with it stays."""
    return jnp.where(scores < jax.lax.top_k(scores, min(k, scores.shape[1]))[0][:, -1:], -jnp.inf, scores)


def top_p(scores, rest):
    """Forbids the least likely tokens whose probabilities make up at most `rest` together (nucleus sampling, arXiv 1904.09751)."""
    order = jnp.argsort(scores, axis=1)  # ascending
    tail = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(scores, order, axis=1), axis=1), axis=1)
    return forbid(scores, order, (tail <= rest).at[:, -1].set(False))
