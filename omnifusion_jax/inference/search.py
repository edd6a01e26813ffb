"""Chooses tokens: greedily, by sampling and by beam search, in rows that need not ask for the same.

Beam search is that of transformers 5 (generation/utils.py, `_beam_search`). Each step takes the best
continuations of all running beams of a request, 1 + (number of its end tokens) times as many as it has beams.
A continuation ends by an end token or when no room is left. Ended continuations among the first `beams`
compete for a place in `finished`, by log probability over length ** length_penalty. The best of the others
are the running beams of the next step. With a temperature the continuations are drawn instead, without
putting back.

A request with n beams has n rows, one after the other. Each row computes what concerns its whole search,
which is little, and takes the place that is its own.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from omnifusion_jax.inference.options import IF_FULL, NEVER_EARLY, NONE, Options, Sizes
from omnifusion_jax.inference.processors import So, asking, process, sampled

NEVER = -1e9  # a score with this added loses against every real score
# Scores of tokens that are not allowed are lower: the smallest number, at any temperature up to a million
FORBIDDEN = -1e32
BLOCKS = 128  # parts of a row of scores


class Tokens(NamedTuple):
    """Tokens that continue texts; every field is [rows], or [rows, n] where there is a choice of them."""

    token: jax.Array  # int32
    logprob: jax.Array  # float32: by the model's unprocessed distribution
    score: jax.Array  # float32: of the text with the token
    ended: jax.Array  # bool: the text ends with the token
    state: jax.Array  # int32: how much of a stop string it ends with, see stops.py

    def pick(self, index) -> Self:
        """Of a choice the tokens at `index`, int32[rows]."""
        return jax.tree.map(lambda a: pick(a, index), self)


class Likeliest(NamedTuple):
    """The likeliest tokens of a step, by the model's unprocessed distribution, in order."""

    token: jax.Array  # int32[rows, likeliest]
    logprob: jax.Array  # float32[rows, likeliest]


class Texts(NamedTuple):
    """An answer, or the beginning of one, in each row."""

    tokens: jax.Array  # int32[rows, room]; 0 after the last
    logprobs: jax.Array  # float32[rows, room]: of the tokens, by the model's unprocessed distribution
    length: jax.Array  # int32[rows]
    score: jax.Array  # float32[rows]: what beams are ranked by
    ended: jax.Array  # bool[rows]
    state: jax.Array  # int32[rows]: how much of a stop string they end with, see stops.py
    likeliest: Likeliest  # of every step, [rows, room, likeliest]

    @classmethod
    def empty(cls, rows: int, sizes: Sizes) -> Self:
        told = (rows, sizes.room, min(sizes.likeliest, sizes.vocab))
        return cls(
            tokens=jnp.zeros((rows, sizes.room), jnp.int32),
            logprobs=jnp.zeros((rows, sizes.room), jnp.float32),
            length=jnp.zeros(rows, jnp.int32),
            score=jnp.zeros(rows, jnp.float32),
            ended=jnp.zeros(rows, bool),
            state=jnp.zeros(rows, jnp.int32),
            likeliest=Likeliest(jnp.zeros(told, jnp.int32), jnp.zeros(told, jnp.float32)),
        )

    def take(self, rows) -> Self:
        """The texts of `rows`, int32[rows]."""
        return jax.tree.map(lambda a: a[rows], self)

    def append(self, new: Tokens, likeliest: Likeliest) -> Self:
        """The texts with one more token each; `likeliest` are those of the step that chose it."""
        at = jnp.arange(len(self.length)), self.length
        return Texts(
            tokens=self.tokens.at[at].set(new.token),
            logprobs=self.logprobs.at[at].set(new.logprob),
            length=self.length + 1,
            score=new.score,
            ended=new.ended,
            state=new.state,
            likeliest=jax.tree.map(lambda all, one: all.at[at].set(one), self.likeliest, likeliest),
        )


class Logprobs(NamedTuple):
    """Log probabilities of the next token, which are computed for the tokens that somebody asks about."""

    logits: jax.Array  # float32[rows, vocab]
    top: jax.Array  # float32[rows, 1]: the largest
    total: jax.Array  # float32[rows, 1]: log of the sum of exponentials of what each is below `top`

    @classmethod
    def of(cls, logits) -> Self:
        top = logits.max(1, keepdims=True)
        return cls(logits, top, jnp.log(jnp.exp(logits - top).sum(1, keepdims=True)))

    def all(self):
        """float32[rows, vocab]."""
        return self.logits - self.top - self.total

    def at(self, tokens):
        """Of tokens int32[rows, n] of each row, float32[rows, n]."""
        return jnp.take_along_axis(self.logits, tokens, axis=1) - self.top - self.total


class Scores(NamedTuple):
    """Scores of the next token as Options ask for them; float32[rows, vocab] each."""

    score: jax.Array  # of the text with the token
    drawn: jax.Array  # the same with noise where a row is sampled: the largest is chosen


class Group(NamedTuple):
    """The rows of the search that each row belongs to."""

    rows: jax.Array  # int32[rows, beams]; where there are fewer beams, the row itself
    inside: jax.Array  # bool[rows, beams]: False where there are fewer

    @classmethod
    def of(cls, o: Options, sizes: Sizes) -> Self:
        here, beam = jnp.arange(len(o.rank))[:, None], jnp.arange(sizes.beams)
        inside = beam < o.beams[:, None]
        return cls(jnp.where(inside, here - o.rank[:, None] + beam, here), inside)

    def gather(self, values, fill):
        """[rows, beams, ...] of values [rows, ...]."""
        inside = self.inside.reshape(*self.inside.shape, *(1,) * (values.ndim - 1))
        return jnp.where(inside, values[self.rows], fill)


class Search(NamedTuple):
    """What has been chosen so far, in every row. Rows that are done do not change."""

    running: Texts
    finished: Texts  # of a search with beams: the best that ended, in order; an empty place scores NEVER
    parents: jax.Array  # int32[rows]: the row that each running text continues
    done: jax.Array  # bool[rows]; equal in all rows of a search
    broken: jax.Array  # bool[rows]: done because the model's scores were not numbers
    stuck: jax.Array  # bool[rows]: done because no token was allowed, and no answer had ended before

    @classmethod
    def start(cls, rows: int, sizes: Sizes) -> Self:
        """A Search with nothing to do: all rows are done."""
        empty, none = Texts.empty(rows, sizes), jnp.zeros(rows, bool)
        return cls(empty, empty, jnp.arange(rows), ~none, none, none)

    def restart(self, fresh, o: Options) -> Self:
        """Begins an answer in the rows where `fresh`, bool[rows], is true; it is equal in all of a search."""
        empty = jax.tree.map(jnp.zeros_like, self.running)
        # All beams begin as copies of the first one, so only the first may be continued.
        first = empty._replace(score=jnp.where(o.rank == 0, 0.0, NEVER))
        lost = empty._replace(score=jnp.full_like(empty.score, NEVER))
        none = jnp.zeros_like(fresh)
        return where(fresh, Search(first, lost, jnp.arange(len(fresh)), none, none, none), self)

    @property
    def length(self):
        """Tokens chosen so far, int32[rows]."""
        return self.running.length

    def last(self):
        """The token chosen last, int32[rows]; 0 where there is none."""
        return pick(self.running.tokens, jnp.maximum(self.length - 1, 0))

    def answers(self, o: Options) -> Texts:
        """The answers so far. Rows of a search with beams hold its finished ones, the best in the first."""
        return where(o.beams > 1, self.finished, self.running)

    def choose(self, logits, o: Options, sizes: Sizes, active=None) -> Self:
        """Chooses the next token of each row that is not done, by logits float32[rows, vocab].

        `active`, bool[rows], is false in rows that must not change though they are not done; it is equal in
        all rows of a search. Nothing is computed that no row asks for.
        """
        going = ~self.done if active is None else ~self.done & active
        group = Group.of(o, sizes)
        logprobs = Logprobs.of(logits)
        # NaN and infinite logits make a total that is NaN
        failed = going & group.gather(jnp.isnan(logprobs.total[:, 0]), False).any(1)
        likeliest = self.tell(logprobs, o, going)

        def greedily():
            return self.alone(best(logits), logprobs, likeliest, o), jnp.zeros_like(going)

        def processed():
            scores = self.process(logprobs, o, sizes, going)
            token = best(scores.drawn)
            closed = group.gather(pick(scores.score, token), -jnp.inf).max(1) < FORBIDDEN
            alone = self.alone(token, logprobs, likeliest, o)
            if sizes.beams == 1:
                return alone, closed
            searched = jax.lax.cond(
                (going & (o.beams > 1)).any(),
                lambda: self.beams(scores, logprobs, likeliest, o, sizes, group),
                lambda: alone,
            )
            return where(o.beams > 1, searched, alone), closed

        asked = asking(o, self.length) | (o.beams > 1)
        new, closed = jax.lax.cond((going & asked).any(), processed, greedily)
        closed &= going & ~failed
        ended = group.gather(self.finished.ended, False).any(1)
        kept = where(going & ~failed & ~closed, new, self._replace(parents=jnp.arange(len(going))))
        return kept._replace(
            done=kept.done | failed | closed,
            broken=kept.broken | failed,
            stuck=kept.stuck | (closed & ~ended),
        )

    def tell(self, logprobs: Logprobs, o, going) -> Likeliest:
        """The Likeliest of this step; zeros where no row asks for them."""
        nothing = jax.tree.map(lambda a: jnp.zeros_like(a[:, 0]), self.running.likeliest)
        if nothing.token.size == 0:
            return nothing

        def found():
            logprob, token = jax.lax.top_k(logprobs.all(), nothing.token.shape[1])
            return Likeliest(token, logprob)

        return jax.lax.cond((going & (o.likeliest > 0)).any(), found, lambda: nothing)

    def process(self, logprobs: Logprobs, o, sizes, going) -> Scores:
        """The Scores of the next token in the rows that are `going`."""
        score, several = logprobs.logits, o.beams > 1
        if sizes.beams > 1:  # as in transformers: beams are ranked by log probabilities, rows alone need none
            score = where(several, logprobs.all(), score)
        score = process(score, So(self.running.tokens, self.length), o, going)
        if sizes.beams > 1:
            score += jnp.where(several, self.running.score, 0)[:, None]

        def draw():
            return jnp.where(sampled(o)[:, None], score + noise(o, self.length, score.shape[1]), score)

        drawn = jax.lax.cond((going & sampled(o)).any(), draw, lambda: score)
        return Scores(score, drawn)

    def alone(self, token, logprobs: Logprobs, likeliest, o) -> Self:
        """Continues each row by its token, int32[rows]."""
        ended, state = self.ends(token[:, None], self.running.state[:, None], o)
        new = Tokens(token, logprobs.at(token[:, None])[:, 0], self.running.score, ended[:, 0], state[:, 0])
        running = self.running.append(new, likeliest)
        return self._replace(running=running, done=new.ended, parents=jnp.arange(len(token)))

    def beams(self, scores: Scores, logprobs: Logprobs, likeliest, o, sizes, group) -> Self:
        """Continues each search by its best tokens."""
        grown, parent, counted = self.grow(scores, logprobs, o, sizes, group)
        lost = jnp.where(counted, jnp.where(grown.ended, NEVER, 0), -jnp.inf)
        alive = grown._replace(score=grown.score + lost)
        kept = pick(jax.lax.top_k(alive.score, sizes.beams)[1], o.rank)
        parents = pick(parent, kept)
        running = self.grown(parents, alive.pick(kept), likeliest)
        finished = self.finish(grown, parent, counted, likeliest, o, sizes, group)
        # all that might go on has ended; else it depends on what may still become better
        over = (grown.ended | ~counted).all(1)
        done = over | self.settled(running, finished, o, group)
        return self._replace(running=running, finished=finished, parents=parents, done=done)

    def grown(self, parents, new: Tokens, likeliest) -> Texts:
        """The running texts of `parents`, int32[rows], with a token more."""
        return self.running.take(parents).append(new, jax.tree.map(lambda a: a[parents], likeliest))

    def grow(self, scores: Scores, logprobs: Logprobs, o, sizes, group):
        """The best continuations of the search of each row.

        Returns (Tokens [rows, n], best first; the row that each continues, int32[rows, n]; which of them
        count, bool[rows, n]).
        """
        most = (sizes.ends + 1) * sizes.beams
        each = min(most, scores.drawn.shape[1])
        chance, token = jax.lax.top_k(scores.drawn, each)
        ended, state = self.ends(token, jnp.broadcast_to(self.running.state[:, None], token.shape), o)
        score = jnp.take_along_axis(scores.score, token, axis=1)
        tokens = Tokens(token, logprobs.at(token), score, ended, state)
        chances = group.gather(chance, -jnp.inf).reshape(len(token), -1)
        _, index = jax.lax.top_k(chances, min(most, chances.shape[1]))
        beam, place = jnp.divmod(index, each)
        parent = jnp.take_along_axis(group.rows, beam, axis=1)
        grown = jax.tree.map(lambda a: a[parent, place], tokens)
        counted = jnp.arange(index.shape[1]) < (((o.ends != NONE).sum(1) + 1) * o.beams)[:, None]
        return grown, parent, counted

    def finish(self, grown: Tokens, parent, counted, likeliest, o, sizes, group) -> Texts:
        """The best finished texts of each search, with those of `grown` that end now."""
        enters = grown.ended & counted & (jnp.arange(counted.shape[1]) < o.beams[:, None])
        score = grown.score / pick(o.norm, self.length)[:, None] + jnp.where(enters, 0, NEVER)
        entrants = grown._replace(score=jnp.where(counted, score, -jnp.inf), ended=enters)
        old = group.gather(self.finished.score, -jnp.inf)
        best = jax.lax.top_k(jnp.concatenate([old, entrants.score], axis=1), sizes.beams)[1]
        place = pick(best, o.rank)  # among the old ones, and then among the entrants
        entrant = jnp.maximum(place - sizes.beams, 0)
        new = self.grown(pick(parent, entrant), entrants.pick(entrant), likeliest)
        stays = self.finished.take(pick(group.rows, jnp.minimum(place, sizes.beams - 1)))
        return where(place < sizes.beams, stays, new)

    def settled(self, running: Texts, finished: Texts, o, group):
        """Rows whose search is over, bool[rows].

        Either no running beam can still win, by Hugging Face's estimate, or enough beams have finished and
        that is enough.
        """
        length = jnp.where(o.early == NEVER_EARLY, o.limit, running.length)
        hope = running.score[group.rows[:, 0]] / pick(o.norm, length - 1)
        ended = group.gather(finished.ended, True)
        worst = group.gather(finished.score, jnp.inf).min(1, keepdims=True)
        open_ = (hope[:, None] > jnp.where(ended, worst, NEVER)) & group.inside
        return ~open_.any(1) | ((o.early == IF_FULL) & ended.all(1))

    def ends(self, token, state, o):
        """(whether texts end with the tokens int32[rows, n] as their next, int32[rows, n] their states then).

        `state`, int32[rows, n], is what the texts have before.
        """
        end = (token[:, :, None] == o.ends[:, None]).any(2) | (self.length + 1 >= o.limit)[:, None]
        if o.stop_kind.size == 0:
            return end, state
        kind = jnp.take_along_axis(o.stop_kind, token, axis=1).astype(jnp.int32)
        after = o.stop_move[jnp.arange(len(kind))[:, None], kind, state].astype(jnp.int32)
        return end | (after < 0), jnp.where(after < 0, ~after, after)


def where(condition, ours, theirs):
    """Of two trees of arrays [rows, ...], ours in the rows where `condition`, bool[rows], is true."""

    def choose(a, b):
        return jnp.where(condition.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, ours, theirs)


def pick(values, index):
    """values[row, index[row]] of each row; values are [rows, n], index is int32[rows]."""
    return jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]


def best(scores):
    """The index of the largest of scores [rows, n], int32[rows]; of several the first.

    This is `argmax`, of which XLA makes a slow loop on CPUs: so it looks through one of BLOCKS, the first
    with the largest score.
    """
    missing = -scores.shape[1] % BLOCKS
    padded = jnp.pad(scores, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    blocks = padded.reshape(len(scores), BLOCKS, -1)
    block = blocks.max(2).argmax(1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0].argmax(1)
    return (block * blocks.shape[2] + inside).astype(jnp.int32)


def noise(o: Options, length, vocab: int):
    """Gumbel noise float32[rows, vocab]: the largest of log probabilities with it is a draw by them, and the
    n largest are n draws without putting back (arXiv 1903.06059).

    It depends on a row's seed, its name and the number of its tokens, and on nothing else.
    """

    def draw(seed, name, step):
        key = jax.random.key(seed)
        for word in (name[0], name[1], step):
            key = jax.random.fold_in(key, word)
        return jax.random.gumbel(key, (vocab,))

    return jax.vmap(draw)(o.seed, o.name, length)
