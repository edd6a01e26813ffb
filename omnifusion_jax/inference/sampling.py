"""One sequence a row: the likeliest token, or one drawn at random."""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.inference.logits import process


def words(name):
    """uint32[2] that stand for a request in its random key: a hash of its id, a string, or of its place in a
    list, a number.
    """
    digest = hashlib.sha256(f"{type(name).__name__}:{name}".encode(errors="surrogatepass")).digest()
    return np.frombuffer(digest[:8], "<u4")


def keys(seed, words):
    """A random key for each row of uint32[rows, 2]: it follows from the seed and these words alone."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row[0]), row[1]))(
        words
    )


class Draws(NamedTuple):
    """What greedy decoding and sampling have chosen so far. A finished row pads."""

    tokens: jax.Array  # int32[rows, room]
    length: jax.Array  # int32[rows]
    logprob: jax.Array  # float32[rows]: sum over the chosen tokens, by the model's own distribution
    done: jax.Array  # bool[rows]
    keys: jax.Array  # random keys [rows]
    parents: None = None  # rows stay where they are

    @classmethod
    def start(cls, blank, keys, rules):
        """`blank` bool[rows]: rows that only fill the batch."""
        rows = len(blank)
        return cls(
            jnp.full((rows, rules.room), rules.pad, jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, jnp.float32),
            blank,
            keys,
        )

    def choose(self, logits, step, knobs, rules):
        """The next token of every row from float32[rows, vocab]."""
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
        """One token a row. A row's randomness depends on its key and the step alone, never on its neighbours."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, step)
        return jax.vmap(jax.random.categorical)(keys, scores).astype(jnp.int32)

    def last(self, step):
        """int32[rows]: the tokens chosen at `step - 1`."""
        return self.tokens[:, step - 1]

    def best(self):
        """(tokens int32[rows, room], length int32[rows], logprob float32[rows])."""
        return self.tokens, self.length, self.logprob
