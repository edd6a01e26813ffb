"""Logits processors: changes to the scores of the next token that Options ask for.

Every processor is a pure function of scores float32[rows, vocab], the Texts so far and Options, and equals
its namesake in transformers 5 (generation/logits_process.py) in the rows that ask for it. Processors see the
tokens generated so far but not the prompt, as with Hugging Face's `inputs_embeds`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnifusion_jax.inference.options import ALL, ANY, NONE, WORD, Options


class So(NamedTuple):
    """Tokens generated so far: `tokens[row, : length[row]]`."""

    tokens: jax.Array  # int32[rows, room]
    length: jax.Array  # int32[rows]


def penalise(scores, so: So, o: Options):
    """Makes tokens that were generated already less likely (arXiv 1909.05858).

    Positive scores are divided by the penalty, negative ones multiplied. transformers 5 skips as many of a
    row's first generated tokens as there is padding before its prompt, although they are not padding; here
    none is skipped.
    """
    seen = marked(scores, so.tokens, jnp.arange(so.tokens.shape[1]) < so.length[:, None])
    penalty = o.penalty[:, None]
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def no_repeat_ngram(scores, so: So, o: Options):
    """Forbids every token that would complete an n-gram which was generated already."""
    tokens, length, n = so.tokens, so.length[:, None], o.ngram[:, None]
    place = jnp.arange(tokens.shape[1])

    def compare(i, hit):
        """Of tokens that complete an n-gram: whether the i-th before them equals the i-th from the end."""
        ending = jnp.take_along_axis(tokens, jnp.maximum(length - i, 0), axis=1)
        return hit & ((jnp.roll(tokens, i, axis=1) == ending) | (i >= n))

    complete = (place >= n - 1) & (place < length)
    hit = jax.lax.fori_loop(1, jnp.minimum(n.max(), tokens.shape[1]), compare, complete)
    return forbid(scores, tokens, hit)


def no_banned(scores, so: So, o: Options):
    """Forbids the last token of each banned sequence wherever its other tokens have just been generated."""
    width = o.bans.shape[2] - 1
    at = so.length[:, None] - width + jnp.arange(width)  # [rows, width]
    # Before the first generated token stands ANY - 1, which equals no token.
    ending = jnp.where(at >= 0, jnp.take_along_axis(so.tokens, jnp.maximum(at, 0), axis=1), ANY - 1)
    before, last = o.bans[:, :, :-1], o.bans[:, :, -1]
    hit = ((before == ANY) | (before == ending[:, None])).all(-1)  # [rows, bans]
    return forbid(scores, last, hit & (last != NONE))


def no_end(scores, so: So, o: Options):
    """Forbids the end tokens."""
    return forbid(scores, o.ends, o.ends != NONE)


def allow(scores, so: So, o: Options):
    """Forbids all but the allowed tokens."""
    return jnp.where(unpacked(o.allowed, scores.shape[1]), scores, -jnp.inf)


def force_first(scores, so: So, o: Options):
    return force(scores, o.first)


def force_last(scores, so: So, o: Options):
    return force(scores, o.last)


def force(scores, token):
    """Allows only `token`, int32[rows], with score 0, so that it costs a beam nothing."""
    return jnp.where(jnp.arange(scores.shape[1]) == token[:, None], 0.0, -jnp.inf)


def finite(scores, so: So, o: Options):
    """Replaces NaN by 0, and infinities by the largest and smallest finite numbers."""
    return jnp.nan_to_num(scores, nan=0.0)


def suppress(scores, so: So, o: Options):
    """Forbids the suppressed tokens."""
    return jnp.where(unpacked(o.suppressed, scores.shape[1]), -jnp.inf, scores)


def suppress_first(scores, so: So, o: Options):
    """Forbids the tokens that may not begin an answer."""
    return jnp.where(unpacked(o.suppressed_first, scores.shape[1]), -jnp.inf, scores)


def heat(scores, so: So, o: Options):
    return scores / o.temperature[:, None]


def top_k(scores, so: So, o: Options):
    """Forbids tokens that score less than the k-th best; tokens that tie with it stay."""
    k = jnp.minimum(o.top_k, scores.shape[1])
    bar = largest(scores, lambda here: here.sum(1) >= k)
    return jnp.where(scores < jnp.fmin(bar, safe(scores, o))[:, None], -jnp.inf, scores)


def top_p(scores, so: So, o: Options):
    """Forbids the least likely tokens, whose probabilities sum to at most 1 - top_p.

    This is nucleus sampling (arXiv 1904.09751); the likeliest token always stays. Of tokens that tie at the
    edge, of which sorting would keep some, all stay.
    """
    probabilities = jax.nn.softmax(scores, axis=1)
    bar = largest(scores, lambda here: jnp.where(here, 0, probabilities).sum(1) <= o.rest)
    return jnp.where(scores < jnp.fmin(bar, safe(scores, o))[:, None], -jnp.inf, scores)


def min_p(scores, so: So, o: Options):
    """Forbids tokens that are less likely than `min_p` times the likeliest (arXiv 2407.01082)."""
    probabilities = jax.nn.softmax(scores, axis=1)
    bar = o.min_p[:, None] * probabilities.max(1, keepdims=True)
    return jnp.where((probabilities < bar) & (scores < safe(scores, o)[:, None]), -jnp.inf, scores)


def sampled(o: Options):
    """Rows that are sampled, bool[rows]."""
    return o.temperature > 0


# The changes in Hugging Face's order, and which rows ask for each, of Options and the number of tokens so far
CHAIN = (
    (penalise, lambda o, length: o.penalty != 1),
    (no_repeat_ngram, lambda o, length: o.ngram > 0),
    (no_banned, lambda o, length: (o.bans[:, :, -1] != NONE).any(1)),
    (no_end, lambda o, length: length < o.least),
    (allow, lambda o, length: (o.allowed != ALL).any(1)),
    (force_first, lambda o, length: (o.first != NONE) & (length == 0)),
    (force_last, lambda o, length: (o.last != NONE) & (length == o.limit - 1)),
    (finite, None),
    (suppress, lambda o, length: (o.suppressed > 0).any(1)),
    (suppress_first, lambda o, length: (o.suppressed_first > 0).any(1) & (length == (o.first != NONE))),
    (heat, lambda o, length: sampled(o) & (o.temperature != 1)),
    (top_k, lambda o, length: sampled(o) & (o.top_k > 0)),
    (top_p, lambda o, length: sampled(o) & (o.rest > 0)),
    (min_p, lambda o, length: sampled(o) & (o.min_p > 0)),
)


def asking(o: Options, length):
    """Rows that ask for more than the likeliest token, bool[rows]."""
    return jnp.any(jnp.stack([sampled(o), *(asks(o, length) for _, asks in CHAIN if asks)]), axis=0)


def process(scores, so: So, o: Options, going):
    """The scores as Options ask for them; what no row asks for that is `going`, bool[rows], costs nothing."""
    for change, asks in CHAIN:
        if asks is None:
            scores = change(scores, so, o)
            continue
        asked = asks(o, so.length) & going

        def changed(scores, asked=asked, change=change):
            return jnp.where(asked[:, None], change(scores, so, o), scores)

        scores = jax.lax.cond(asked.any(), changed, lambda scores: scores, scores)
    return scores


def marked(scores, tokens, there):
    """bool[rows, vocab]: True at `[row, tokens[row, i]]` wherever `there[row, i]` is."""
    rows = jnp.arange(len(scores))[:, None]
    return jnp.zeros(scores.shape, bool).at[rows, tokens].max(there)


def forbid(scores, tokens, hit):
    """Sets `scores[row, tokens[row, i]]` to minus infinity wherever `hit[row, i]` is true."""
    return jnp.where(marked(scores, tokens, hit), -jnp.inf, scores)


def unpacked(words, vocab):
    """bool[rows, vocab] of a packed mask, uint32[rows, words]."""
    bits = words[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32) & 1
    return bits.reshape(len(words), -1)[:, :vocab] > 0


def safe(scores, o: Options):
    """The lowest score that sampling always leaves, float32[rows]: the best, or of a search, which must be
    able to go on whatever ends, the best but one for each end token.
    """
    best, _ = jax.lax.top_k(scores, min(o.ends.shape[1] + 1, scores.shape[1]))
    place = jnp.where(o.beams > 1, (o.ends != NONE).sum(1), 0)
    return jnp.take_along_axis(best, place[:, None], axis=1)[:, 0]


def largest(scores, holds):
    """The largest number, float32[rows], up to which a condition holds; NaN if it holds for all.

    `holds` says of which rows it is true, bool[rows], given which scores are at least a number, bool[rows,
    vocab]. The range of the scores' bits is halved, which are ordered as the scores are once the sign is
    dealt with: 32 passes over the scores, where sorting takes many more.
    """
    scores = jnp.where(scores == 0, 0.0, scores)  # -0.0 equals 0.0, and its bits should too
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    top = jnp.uint32(1 << 31)
    order = jnp.where(bits >= top, ~bits, bits | top)

    def grow(i, found):
        larger = found | (top >> i.astype(jnp.uint32))
        return jnp.where(holds(order >= larger[:, None]), larger, found)

    found = jax.lax.fori_loop(0, 32, grow, jnp.zeros(len(scores), jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(found >= top, found ^ top, ~found), jnp.float32)
