"""Who may look at whom, and the one entry to attention that obeys."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnifusion_jax.nn.dropout import drop
from omnifusion_jax.tables import Table


class Places(NamedTuple):
    """What attention knows of each token."""

    segments: jax.Array  # int32[batch, n]; 0 is padding
    positions: jax.Array  # int32[batch, n], counted from 0 in each segment
    order: jax.Array  # int32[batch, n]: a token sees those of its own number and of lower ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Attention inside segments, from later tokens to earlier ones, within a window. Small arrays: a mask is made only
    where a kernel needs one.

    Queries and keys are described apart, so that one spec serves training (the same sequence twice) and decoding (new
    tokens against a cache). Without either, every query sees every key.
    """

    query: Places | None = None
    key: Places | None = None
    # a query sees the last `window` positions, its own included; None: all
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    kernel: str = dataclasses.field(default="dense", metadata={"static": True})  # a row of KERNELS

    @classmethod
    def of(cls, segments, positions, window=None, later=None):
        """Of one sequence, int32[batch, n] each.

        `later` says where the order goes up, as in big_vision's `mask_ar`: 1 where a token is hidden from those
        before it, 0 where it belongs to the block of the one before, whose tokens see each other both ways. None: 1
        everywhere, which is causal. So 0 0 0 1 1 is a prefix of three that is read both ways, and two causal tokens.
        """
        order = positions if later is None else jnp.cumsum(later, axis=1)
        here = Places(segments, positions, order)
        return cls(here, here, window)

    def mask(self):
        """bool[batch, query, key]; None where nothing is hidden. Two dialogues and a pad in one row (segments
        1 1 2 2 0) give

        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . . . .
        """
        if self.query is None:
            return None
        q = Places(*(a[:, :, None] for a in self.query))
        k = Places(*(a[:, None, :] for a in self.key))
        seen = (q.segments == k.segments) & (k.segments > 0) & (k.order <= q.order)
        return seen if self.window is None else seen & (q.positions - k.positions < self.window)


EVERYTHING = AttentionSpec()


def attend(q, k, v, spec=EVERYTHING, dropout=(0.0, None)):
    """Softmax attention, as `spec` says, by the kernel that it names.

    q [batch, kv_heads, group, query, head_dim], k and v [batch, kv_heads, key, head_dim]; `dropout` is (rate, key), of
    the probabilities. Returns the shape of q. A kernel that cannot honour what is asked of it raises ConfigError.
    """
    return KERNELS[spec.kernel](q, k, v, spec, dropout)


def dense(q, k, v, spec, dropout):
    """All scores at once, scores and softmax in float32.

    A padding row masks everything: it is filled with the smallest finite number, since the NaN of minus infinity would
    reach real rows through 0 * NaN.
    """
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if (mask := spec.mask()) is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype), *dropout)
    return jnp.einsum("bkgts,bksd->bkgtd", probabilities, v)


KERNELS = Table("attention kernel", rows={"dense": dense})
