"""Cross-entropy over target tokens, as a sum and a count, so that accumulation can divide once at the end."""

import jax
import jax.numpy as jnp

from omnifusion_jax import sharding
from omnifusion_jax.batch import INSTEAD, UNKNOWN, Batch


def token_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array, costs: jax.Array | bool = True):
    """The weighted sum of -log p over all targets, and the sum of their weights: two float32 scalars.

    Args:
      logits: float32[..., vocab].
      targets: int32[...].
      weights: float32[...].
      costs: bool[...]; a target where it is false adds nothing to the loss, but its weight to the count.
    """
    return jnp.sum(weights * jnp.where(costs, -log_p(logits, targets), 0.0)), weights.sum()


def log_p(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The log-probability float32[...] of targets int32[...] under logits float32[..., vocab]."""
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(
        logits, axis=-1
    )


def by_rows(weights: jax.Array, rows: int) -> jax.Array:
    """Rescales loss weights [batch, ...] so that the loss is the mean of the means over `rows` rows each.

    The weights of each group of rows then add up to 1. The published code averages like this: over
    micro-batches of 4 rows (phase 1) or 1 (phase 2), then over accumulation steps and devices. There the mean
    of a group without targets is NaN; here such a group counts for nothing.
    """
    groups = weights.reshape(len(weights) // rows, -1)
    count = groups.sum(axis=1, keepdims=True)
    return (groups / jnp.where(count == 0, 1, count)).reshape(weights.shape)


def answer_loss(decoder, hidden: jax.Array, batch: Batch, chunk: int | None = None, remat: str = "full"):
    """The loss of a batch, as `token_loss` gives it, from hidden states [batch, seq, width].

    Position t predicts token t + 1. A target of the kind UNKNOWN costs nothing but counts, as in the
    published loss; one of the kind INSTEAD is the token `index`. Logits exist for at most `chunk` positions
    at a time, in the backward pass too, so that an array [batch, seq, vocab] is never made; except with
    `remat` "none", which keeps them all.

    By default they are 512, or as many as give a device 2048 tokens: the gradient of the head is summed over
    devices once a piece, and with fewer tokens the TPU compiler sums all of it on every device.
    """
    split = in_pieces(hidden, chunk)

    def add(total, piece):
        x, targets, weights, kind = piece
        sums = token_loss(decoder.logits(x), targets, weights, kind != UNKNOWN)
        return jax.tree.map(jnp.add, total, sums), None

    zero = (jnp.zeros(()), jnp.zeros(()))
    inputs = (split(hidden), split(targets_of(batch), 1), split(batch.weights, 1), split(batch.kind, 1))
    total, _ = jax.lax.scan(add if remat == "none" else jax.checkpoint(add), zero, inputs)
    return total


def log_likelihoods(decoder, hidden: jax.Array, batch: Batch, chunk: int | None = None, remat: str = "full"):
    """log p of each token of a batch after those before it in its segment: float32[batch, seq].

    That of a row's first token is 0, and that of what begins another segment or is no text means nothing.
    Arguments as in `answer_loss`.
    """
    split = in_pieces(hidden, chunk)

    def score(_, piece):
        x, targets = piece
        return None, log_p(decoder.logits(x), targets)

    step = score if remat == "none" else jax.checkpoint(score)
    _, found = jax.lax.scan(
        step, None, (split(hidden), split(targets_of(batch), 1))
    )  # [pieces, batch, chunk]
    found = found.swapaxes(0, 1).reshape(len(hidden), -1)[:, : hidden.shape[1] - 1]
    return jnp.pad(found, [(0, 0), (1, 0)])


def targets_of(batch: Batch) -> jax.Array:
    """What the position before each token learns, int32[batch, seq]."""
    return jnp.where(batch.kind == INSTEAD, batch.index, batch.tokens)


def in_pieces(hidden: jax.Array, chunk: int | None):
    """The function that cuts arrays [batch, seq, ...] into pieces of at most `chunk` positions each."""
    length = hidden.shape[1]
    chunk = chunk or max(512, 2048 // sharding.share("batch", len(hidden)))
    pieces = -(-length // chunk)  # rounded up
    padded = pieces * -(-length // pieces)  # pieces of one length, with fewer than `pieces` blank positions

    def split(a, shift=0):
        """[batch, seq, ...] from position `shift` on, as [pieces, batch, chunk, ...]."""
        # padding: the last position predicts nothing
        a = jnp.pad(a[:, shift:], [(0, 0), (0, padded - length + shift)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(a.shape[0], pieces, -1, *a.shape[2:]).swapaxes(0, 1)

    return split
