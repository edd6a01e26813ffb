"""Cross-entropy over target tokens, as a sum and a count: whoever accumulates divides once."""

import jax
import jax.numpy as jnp

from omnifusion_jax.batch import UNKNOWN


def token_loss(logits, targets, weights, costs=True):
    """float32[..., vocab], int32[...], float32[...] to (weighted sum of -log p, sum of weights).

    `costs` bool[...]: a target of which that is false adds nothing to the former and its weight to the latter.
    """
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * jnp.where(costs, nll, 0.0)), weights.sum()


def by_rows(weights, rows):
    """Loss weights [batch, ...] that make the mean over target tokens one of the means over `rows` rows each.

    So the published code averages: over micro-batches of 4 rows (phase 1) or 1 (phase 2), then over accumulation steps
    and devices. Weights of such a group add up to 1. A group without targets, whose mean is NaN there, counts for
    nothing.
    """
    groups = weights.reshape(len(weights) // rows, -1)
    count = groups.sum(axis=1, keepdims=True)
    return (groups / jnp.where(count == 0, 1, count)).reshape(weights.shape)


def answer_loss(decoder, hidden, batch, chunk=512):
    """The loss of a laid-out batch from hidden states [batch, seq, width]: position t predicts token t + 1. A target of
    the kind UNKNOWN costs nothing yet counts, as in the published loss.

    Logits exist for `chunk` positions at a time, in the backward pass too, so that [batch, seq, vocab] never does.
    """
    length = hidden.shape[1]
    padded = -(-length // chunk) * chunk if length > chunk else length
    pieces = max(1, padded // chunk)

    def split(
        a, shift=0
    ):  # [batch, seq, ...] to [pieces, batch, chunk, ...]; the last position predicts nothing
        a = jnp.pad(a[:, shift:], [(0, 0), (0, padded - length + shift)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(a.shape[0], pieces, -1, *a.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def add(total, piece):
        x, targets, weights, kind = piece
        return jax.tree.map(
            jnp.add, total, token_loss(decoder.logits(x), targets, weights, kind != UNKNOWN)
        ), None

    zero = (jnp.zeros(()), jnp.zeros(()))
    return jax.lax.scan(
        add, zero, (split(hidden), split(batch.tokens, 1), split(batch.weights, 1), split(batch.kind, 1))
    )[0]
