"""Greedy decoding and sampling: each row takes the likeliest token, or one drawn at random."""

import hashlib
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.inference.logits import Knobs, Rules, process


def words(name: str | int) -> np.ndarray:
    """Two words, uint32[2], that stand for a request in its random key.

    They are a hash of its id (a string), or of its place in a list (a number) if it has no id.
    """
    digest = hashlib.sha256(f"{type(name).__name__}:{name}".encode(errors="surrogatepass")).digest()
    return np.frombuffer(digest[:8], "<u4")


def keys(seed, words):
    """Random keys [rows] from the seed and the words uint32[rows, 2] of each row."""

    def key(row):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row[0]), row[1])

    return jax.vmap(key)(words)


class Draws(NamedTuple):
    """What greedy decoding and sampling have chosen so far. A row that is done is filled with padding."""

    tokens: jax.Array  # int32[rows, room]
    length: jax.Array  # int32[rows]
    logprob: jax.Array  # float32[rows]: sum over the chosen tokens, by the model's unprocessed distribution
    done: jax.Array  # bool[rows]
    keys: jax.Array  # random keys [rows]
    parents: None = None  # unlike beams, rows never continue another row

    @classmethod
    def start(cls, blank, keys, rules: Rules) -> Self:
        """Draws before the first token. `blank`, bool[rows], marks rows that only fill the batch."""
        rows = len(blank)
        return cls(
            tokens=jnp.full((rows, rules.room), rules.pad, jnp.int32),
            length=jnp.zeros(rows, jnp.int32),
            logprob=jnp.zeros(rows, jnp.float32),
            done=blank,
            keys=keys,
        )

    def choose(self, logits, step, knobs: Knobs, rules: Rules) -> Self:
        """Chooses the next token of every row; logits are float32[rows, vocab]."""
        scores = process(logits, self.tokens, step, knobs, rules)
        token = self.draw(scores, step) if rules.sample else scores.argmax(1).astype(jnp.int32)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        going = ~self.done
        return self._replace(
            tokens=self.tokens.at[:, step].set(jnp.where(going, token, rules.pad)),
            length=self.length + going,
            logprob=self.logprob + jnp.where(going, logprob, 0),
            done=self.done | (token == rules.eos),
        )

    def draw(self, scores, step):
        """Draws a token for each row, with randomness that depends only on the row's key and the step."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, step)
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)

    def last(self, step):
        """The tokens chosen at `step - 1`, int32[rows]."""
        return self.tokens[:, step - 1]

    def best(self):
        """The answers: (tokens int32[rows, room], length int32[rows], logprob float32[rows])."""
        return self.tokens, self.length, self.logprob
