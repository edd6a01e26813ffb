"""Who may look at whom, and the attention that obeys."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Causal attention inside segments, within a window. Small arrays; the mask is made only where it is used.

    Queries and keys are described apart, so that one spec serves training (the same sequence twice) and decoding (new tokens against a cache).
    """

    query_segments: jax.Array  # int32[batch, query]; 0 is padding
    query_positions: jax.Array  # int32[batch, query], counted from 0 in each segment
    key_segments: jax.Array  # int32[batch, key]
    key_positions: jax.Array  # int32[batch, key]
    window: int | None = dataclasses.field(default=None, metadata={"static": True})  # a query sees the last `window` keys, itself included

    @classmethod
    def of(cls, segments, positions, window=None):
        return cls(segments, positions, segments, positions, window)

    def dense(self):
        """bool[batch, query, key]. Two dialogues and a pad in one row (segments 1 1 2 2 0) give

        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . . . .
        """
        same = self.query_segments[:, :, None] == self.key_segments[:, None, :]
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        seen = same & (self.key_segments[:, None, :] > 0) & (distance >= 0)
        return seen if self.window is None else seen & (distance < self.window)


def attend(q, k, v, mask=None):
    """Softmax attention, scores and softmax in float32.

    q [batch, kv_heads, group, query, head_dim], k and v [batch, kv_heads, key, head_dim], mask bool[batch, query, key] or None.
    A padding row masks everything: it is filled with the smallest finite number, since the NaN of minus infinity would reach real rows
    through 0 * NaN.
    """
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bkgts,bksd->bkgtd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
