"""Beam search, exactly as in transformers 5 (generation/utils.py, `_beam_search`).

Each step takes the 2 * beams best continuations of all running beams. A continuation ends by the
end-of-sequence token or when no room is left. Ended continuations among the best `beams` compete for a
place in `finished`, by log probability over length ** length_penalty. The best of the others are the
running beams of the next step.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from omnifusion_jax.inference.logits import Knobs, Rules, process

NEVER = -1e9  # a score with this added loses against every real score


class Hypotheses(NamedTuple):
    """`n` candidate answers for each batch row."""

    tokens: jax.Array  # int32[batch, n, room]
    score: jax.Array  # float32[batch, n]: what beams are ranked by
    logprob: jax.Array  # float32[batch, n]: sum over the tokens, by the model's unprocessed distribution
    length: jax.Array  # int32[batch, n]
    ended: jax.Array  # bool[batch, n]

    def take(self, index):
        """The hypotheses at `index`, int32[batch, m]."""

        def at_index(a):
            return jnp.take_along_axis(a, index.reshape(index.shape + (1,) * (a.ndim - 2)), axis=1)

        return jax.tree.map(at_index, self)

    def best(self, n):
        """The `n` hypotheses with the best scores, best first."""
        return self.take(jax.lax.top_k(self.score, n)[1])


class Beams(NamedTuple):
    """What beam search has found so far."""

    running: Hypotheses
    finished: Hypotheses  # best first; an empty place scores NEVER
    done: jax.Array  # bool[batch]: nothing can change `finished` any more
    parents: jax.Array  # int32[batch * beams]: the row of the previous step that each running beam continues

    @classmethod
    def start(cls, blank, keys, rules: Rules) -> Self:
        """Beams before the first token. `blank`, bool[batch], marks rows that only fill the batch."""
        shape = len(blank), rules.num_beams
        empty = Hypotheses(
            tokens=jnp.full((*shape, rules.room), rules.pad, jnp.int32),
            score=jnp.full(shape, NEVER, jnp.float32),
            logprob=jnp.zeros(shape, jnp.float32),
            length=jnp.zeros(shape, jnp.int32),
            ended=jnp.zeros(shape, bool),
        )
        # All beams begin as copies of the first one, so only the first may be continued.
        first = empty._replace(score=empty.score.at[:, 0].set(0))
        return cls(first, empty, blank, jnp.arange(empty.score.size))

    def choose(self, logits, step, knobs: Knobs, rules: Rules) -> Self:
        """Chooses the next token of every beam; logits are float32[batch * beams, vocab]."""
        n = rules.num_beams
        grown, parent = self.grow(logits, step, knobs, rules)
        alive = grown._replace(score=grown.score + jnp.where(grown.ended, NEVER, 0))
        _, kept = jax.lax.top_k(alive.score, n)
        running, finished = alive.take(kept), self.finish(grown, step, knobs, rules)
        parents = jnp.take_along_axis(parent, kept, axis=1) + n * jnp.arange(len(kept))[:, None]
        done = self.done | is_settled(running, finished, step, knobs)
        return Beams(running, finished, done, parents.reshape(-1))

    def grow(self, logits, step, knobs, rules):
        """The 2 * beams best continuations of each batch row, best first, and the beam each continues."""
        batch, n, room = self.running.tokens.shape
        logprobs = jax.nn.log_softmax(logits)
        scores = process(logprobs, self.running.tokens.reshape(batch * n, room), step, knobs, rules)
        scores = scores.reshape(batch, n, -1) + self.running.score[:, :, None]
        score, index = jax.lax.top_k(scores.reshape(batch, -1), 2 * n)
        parent, token = jnp.divmod(index, logits.shape[1])
        grown = self.running.take(parent)
        grown = Hypotheses(
            tokens=grown.tokens.at[:, :, step].set(token),
            score=score,
            logprob=grown.logprob + jnp.take_along_axis(logprobs.reshape(batch, -1), index, axis=1),
            length=jnp.full_like(grown.length, step + 1),
            ended=(token == rules.eos) | (step + 1 >= knobs.limit),
        )
        return grown, parent

    def finish(self, grown, step, knobs, rules):
        """The best finished hypotheses, including those of `grown` that end now.

        A row that is done keeps the ones that it has.
        """
        n = rules.num_beams
        enters = grown.ended & (jnp.arange(2 * n) < n)
        score = grown.score / knobs.norm[step] + jnp.where(enters, 0, NEVER)
        entrants = grown._replace(score=score, ended=enters)
        merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), self.finished, entrants).best(n)

        def keep_done(old, new):
            return jnp.where(self.done.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

        return jax.tree.map(keep_done, self.finished, merged)

    def last(self, step):
        """The tokens chosen at `step - 1`, int32[batch * beams]."""
        return self.running.tokens[:, :, step - 1].reshape(-1)

    def best(self):
        """The winning beams: (tokens int32[batch, room], length int32[batch], logprob float32[batch])."""
        return self.finished.tokens[:, 0], self.finished.length[:, 0], self.finished.logprob[:, 0]


def is_settled(running, finished, step, knobs):
    """Rows whose search is over, bool[batch].

    Either no running beam can still win, by Hugging Face's estimate, or early stopping is on and enough
    beams have finished.
    """
    hope = running.score[:, :1] / knobs.norm[step]
    worst = jnp.where(finished.ended, finished.score.min(1, keepdims=True), NEVER)
    return ~(hope > worst).any(1) | (knobs.early_stopping & finished.ended.all(1))
