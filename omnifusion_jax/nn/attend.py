"""Which tokens may attend to which, and the function through which all attention runs."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from omnifusion_jax.nn.dropout import drop
from omnifusion_jax.tables import Table


class Places(NamedTuple):
    """What attention knows about each token."""

    segments: jax.Array  # int32[batch, n]; 0 is padding
    positions: jax.Array  # int32[batch, n], counted from 0 in each segment
    order: jax.Array  # int32[batch, n]: a token sees tokens with its own number and with lower ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Attention within segments, from later tokens to earlier ones, optionally within a window.

    The spec holds small arrays; a dense mask is made only in a kernel that needs one. Queries and keys are
    described apart, so that one spec serves training (the same sequence twice) and decoding (new tokens
    against a cache). Without `query` and `key`, every query sees every key.
    """

    query: Places | None = None
    key: Places | None = None
    # a query sees the last `window` positions, including its own; None: all
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    kernel: str = dataclasses.field(default="dense", metadata={"static": True})  # a row of KERNELS

    @classmethod
    def of(cls, segments, positions, window: int | None = None, later=None) -> Self:
        """The spec of a sequence that attends to itself; segments, positions and `later` are int32[batch, n].

        `later` says where the order goes up, as in big_vision's `mask_ar`: 1 where a token is hidden from
        those before it, 0 where it belongs to the block of the token before it, whose tokens all see each
        other. None means 1 everywhere, which is causal. So 0 0 0 1 1 is a prefix of three tokens that see
        each other, and two causal tokens.
        """
        order = positions if later is None else jnp.cumsum(later, axis=1)
        here = Places(segments, positions, order)
        return cls(here, here, window)

    def mask(self):
        """The dense mask bool[batch, query, key], or None if nothing is hidden.

        Two dialogues and a pad in one row (segments 1 1 2 2 0) give

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


def attend(q, k, v, spec: AttentionSpec = EVERYTHING, dropout=(0.0, None)):
    """Softmax attention under `spec`, computed by the kernel that it names.

    q [batch, kv_heads, group, query, head_dim], k and v [batch, kv_heads, key, head_dim]; `dropout` is the
    (rate, key) of dropout on the probabilities. Returns an array of q's shape.

    Raises:
      ConfigError: the kernel is unknown, or cannot do what is asked of it.
    """
    return KERNELS[spec.kernel](q, k, v, spec, dropout)


def dense(q, k, v, spec, dropout):
    """The kernel that computes all scores at once; scores and softmax are float32.

    In a padding row everything is masked. Masked scores are the smallest finite number rather than minus
    infinity, which would make such a row NaN and reach real rows through 0 * NaN.
    """
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if (mask := spec.mask()) is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype), *dropout)
    return jnp.einsum("bkgts,bksd->bkgtd", probabilities, v)


KERNELS = Table("attention kernel", rows={"dense": dense})
