"""Logits processors: changes to the scores of the next token that a GenerationConfig asks for.

Every processor is a pure function of scores float32[rows, vocab] and equals its namesake in transformers 5
(generation/logits_process.py). Processors see the tokens generated so far, `tokens[:, :length]` of
int32[rows, room], but not the prompt, as with Hugging Face's `inputs_embeds`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.config import GenerationConfig, check
from omnifusion_jax.data.tokenizer import Tokenizer

ANY = -1  # fills the table of banned sequences on the left: matches any token, and also the absence of one


@dataclasses.dataclass(frozen=True)
class Rules:
    """The part of a GenerationConfig that is compiled into the programs, for one vocabulary."""

    eos: int
    pad: int
    room: int  # tokens there is space for; `Knobs.limit` says how many may be generated
    num_beams: int = 1
    sample: bool = False
    top_k: int = 0
    nucleus: bool = False
    penalised: bool = False
    no_repeat_ngram_size: int = 0
    banned: tuple[tuple[int, ...], ...] = ()
    forced_eos: bool = False


class Knobs(NamedTuple):
    """The part of a GenerationConfig that may change from call to call without a new compilation."""

    limit: jax.Array  # int32[]: largest number of tokens
    seed: jax.Array  # uint32[]
    temperature: jax.Array  # float32[]
    rest: jax.Array  # float32[]: 1 - top_p
    penalty: jax.Array  # float32[]: repetition penalty
    early_stopping: jax.Array  # bool[]
    norm: jax.Array  # float32[room]: what the score of a beam with 1, 2, 3... tokens is divided by


def rules(g: GenerationConfig, tokenizer: Tokenizer, vocab: int, room: int) -> Rules:
    """The Rules for a GenerationConfig with space for `room` tokens.

    Banned strings are tokenized as in the published recipe, `tokenizer(word, add_special_tokens=False)`. A
    ban on the end-of-sequence token alone is ignored, as in Hugging Face.

    Raises:
      ConfigError: a banned sequence is empty or has a token outside of `vocab`.
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


def knobs(g: GenerationConfig, room: int) -> Knobs:
    """The Knobs for a GenerationConfig, as NumPy values.

    `rest` and `norm` are computed in double precision, as Python code would, and then rounded.
    """
    norm = np.arange(1.0, room + 1) ** g.length_penalty
    return Knobs(
        limit=np.int32(g.max_new_tokens),
        seed=np.uint32(g.seed),
        temperature=np.float32(g.temperature),
        rest=np.float32(1 - g.top_p),
        penalty=np.float32(g.repetition_penalty),
        early_stopping=np.bool_(g.early_stopping),
        norm=norm.astype(np.float32),
    )


def process(scores, tokens, length, knobs: Knobs, rules: Rules):
    """Applies all processors in Hugging Face's order; `length` tokens have been generated."""
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
    """Sets `scores[row, tokens[row, i]]` to minus infinity wherever `hit[row, i]` is true."""
    rows = jnp.arange(len(scores))[:, None]
    return jnp.where(jnp.zeros(scores.shape, bool).at[rows, tokens].max(hit), -jnp.inf, scores)


def penalise(scores, tokens, length, penalty):
    """Makes tokens that were generated already less likely (arXiv 1909.05858).

    Positive scores are divided by `penalty`, negative ones multiplied. transformers 5 skips as many of a
    row's first generated tokens as there is padding before its prompt, although they are not padding; here
    none is skipped.
    """
    there = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < length, tokens.shape)
    seen = jnp.zeros(scores.shape, bool).at[jnp.arange(len(scores))[:, None], tokens].max(there)
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(scores, tokens, length, n):
    """Forbids every token that would complete an n-gram which was generated already."""
    count = tokens.shape[1] - n + 1
    if count < 1:
        return scores
    windows = jnp.stack([tokens[:, i : i + count] for i in range(n)], axis=-1)  # [rows, count, n]
    # The last n - 1 tokens; with fewer of them this is something else, and `hit` is false.
    ending = jax.lax.dynamic_slice_in_dim(tokens, length - (n - 1), n - 1, axis=1)
    hit = (windows[..., :-1] == ending[:, None]).all(-1) & (jnp.arange(count) + n <= length)
    return forbid(scores, windows[..., -1], hit)


def no_banned(scores, tokens, length, banned):
    """Forbids the last token of each banned sequence wherever its other tokens have just been generated."""
    width = max(map(len, banned)) - 1
    padded = [(ANY,) * (width + 1 - len(ids)) + ids[:-1] for ids in banned]
    prefixes = np.array(padded, np.int32).reshape(len(banned), width)
    last = np.array([ids[-1] for ids in banned], np.int32)
    at = length - width + jnp.arange(width)
    # Before the first generated token stands ANY - 1, which equals no token.
    ending = jnp.where(at >= 0, tokens[:, jnp.maximum(at, 0)], ANY - 1)
    hit = ((prefixes == ANY) | (prefixes == ending[:, None])).all(-1)  # [rows, sequences]
    return forbid(scores, jnp.broadcast_to(last, hit.shape), hit)


def force(scores, token, now):
    """If `now` is true, allows only `token`, with score 0, so that it costs a beam nothing."""
    only = jnp.where(jnp.arange(scores.shape[1]) == token, 0.0, -jnp.inf)
    return jnp.where(now, only, scores)


def finite(scores):
    """Replaces NaN by 0, and infinities by the largest and smallest finite numbers."""
    return jnp.nan_to_num(scores, nan=0.0)


def top_k(scores, k):
    """Forbids tokens that score less than the k-th best; tokens that tie with it stay."""
    best, _ = jax.lax.top_k(scores, min(k, scores.shape[1]))
    return jnp.where(scores < best[:, -1:], -jnp.inf, scores)


def top_p(scores, rest):
    """Forbids the least likely tokens, whose probabilities sum to at most `rest`.

    This is nucleus sampling (arXiv 1904.09751) with rest = 1 - top_p; the likeliest token always stays.
    """
    order = jnp.argsort(scores, axis=1)  # ascending
    probabilities = jax.nn.softmax(jnp.take_along_axis(scores, order, axis=1), axis=1)
    tail = jnp.cumsum(probabilities, axis=1)
    return forbid(scores, order, (tail <= rest).at[:, -1].set(False))
