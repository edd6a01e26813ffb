"""The loss of pairs of answers, from log p of their tokens under the model and under a reference."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnifusion_jax.batch import Batch
from omnifusion_jax.config import PreferenceConfig
from omnifusion_jax.data.pairs import CHANGED
from omnifusion_jax.data.reference import REFERENCE


class Both(NamedTuple):
    """Something of both answers of each pair, float32[batch, pairs]; places without a pair hold 0."""

    chosen: jax.Array
    rejected: jax.Array


def pair_loss(scores: jax.Array, batch: Batch, c: PreferenceConfig):
    """The sum of the loss over the pairs of a batch, their number, and sums of what is logged.

    With the log-likelihood of an answer, log pi(y) = sum of w log p over its tokens, or that divided by the
    sum of w if `average`, and the reward r(y) = beta (log pi(y) - log reference(y)), the loss of a pair is

        - (1 - smoothing) log sigmoid(r(chosen) - r(rejected))
        - smoothing log sigmoid(r(rejected) - r(chosen))
        - sft log pi(chosen)

    w is `changed_weight` for tokens that one answer has in place of the other's, else 1. With weight 5,
    `average` and beta 0.5 that is equation 5 of RLHF-V (arXiv 2312.00849); its published script has a sum,
    weight 1.1 and beta 0.1. Plain DPO is a sum with weight 1 (arXiv 2305.18290). Smoothing as in cDPO (E.
    Mitchell, 2023).

    Logged are means over pairs: rewards of both answers and their margin, the share of pairs whose margin is
    positive, targets of both, and `kl`, an estimate of KL(reference || model) for a token: the mean of
    p / q - 1 - log(p / q) over the targets of a pair, with p of the model and q of the reference. It is
    unbiased for answers that the reference gave.

    Args:
      scores: float32[batch, seq], log p of each token.
      batch: rows of pairs, as data.pairs makes them: odd segments are chosen answers, even ones rejected;
        `weights` are 0 or 1.
    """
    ratios = jnp.where(batch.weights > 0, scores - batch.extra[REFERENCE], 0.0)
    weights = batch.weights * (1 + (c.changed_weight - 1) * batch.extra[CHANGED])

    def total(values):
        """Sums of values [batch, seq] over answers."""
        n = batch.tokens.shape[1]  # more segments than a row can have
        sums = jax.vmap(lambda row, segments: jax.ops.segment_sum(row, segments, n + 3))(
            values, batch.segments
        )
        return Both(sums[:, 1 : n + 1 : 2], sums[:, 2 : n + 2 : 2])

    targets = total(batch.weights)
    there = (targets.chosen > 0) & (targets.rejected > 0)
    sizes = total(weights) if c.average else Both(jnp.ones(()), jnp.ones(()))

    def likelihood(values):
        return jax.tree.map(
            lambda sums, size: sums / jnp.where(size > 0, size, 1), total(weights * values), sizes
        )

    rewards = jax.tree.map(lambda ratio: c.beta * ratio, likelihood(ratios))
    margin = rewards.chosen - rewards.rejected
    loss = -(1 - c.smoothing) * jax.nn.log_sigmoid(margin) - c.smoothing * jax.nn.log_sigmoid(-margin)
    if c.sft:
        loss -= c.sft * likelihood(jnp.where(batch.weights > 0, scores, 0.0)).chosen
    divergence = total(batch.weights * (jnp.expm1(ratios) - ratios))
    count = lambda values: jnp.where(there, values, 0.0).sum()
    figures = {
        "chosen_reward": rewards.chosen,
        "rejected_reward": rewards.rejected,
        "reward_margin": margin,
        "preference_accuracy": (margin > 0).astype(jnp.float32),
        "kl": (divergence.chosen + divergence.rejected) / jnp.maximum(targets.chosen + targets.rejected, 1),
        "chosen_tokens": targets.chosen,
        "rejected_tokens": targets.rejected,
    }
    return count(loss), count(1.0), jax.lax.stop_gradient({name: count(a) for name, a in figures.items()})
