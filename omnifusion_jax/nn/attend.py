"""Which tokens may attend to which, and the function through which all attention runs."""

import dataclasses
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from omnifusion_jax.nn.choice import NOW, Choice, Kernel, Need, using
from omnifusion_jax.nn.dropout import drop
from omnifusion_jax.tables import KERNELS

__all__ = ["EVERYTHING", "KERNELS", "AttentionSpec", "Choice", "Kernel", "Places", "attend", "using"]


BLOCK, BLOCKS = 256, 8  # how many causal queries `dense` takes at a time, in how many blocks at most


class Places(NamedTuple):
    """What attention knows about each token."""

    segments: jax.Array  # int32[batch, n]; 0 is padding
    positions: jax.Array  # int32[batch, n], counted from 0 in each segment
    # int32[batch, n]: a token sees tokens with its own number and with lower ones; None: the positions are
    # these numbers, which is causal
    order: jax.Array | None = None

    @property
    def numbers(self):
        return self.positions if self.order is None else self.order


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Attention within segments, from later tokens to earlier ones, optionally within a window.

    The spec holds small arrays; a dense mask is made only in a kernel that needs one. What a kernel must know
    before the arrays have values (whether there are segments, a causal order, other keys) is in its form.
    """

    query: Places | None = None  # None: every query sees every key
    key: Places | None = None  # None: those of `query`, for a sequence that attends to itself
    # a query sees the last `window` positions, including its own; None: all
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    # a row of KERNELS; None: what `using` says
    kernel: str | None = dataclasses.field(default=None, metadata={"static": True})
    # bool[batch, query, key]: what is seen, where places do not say it; then they hide nothing, nor a window
    seen: jax.Array | None = None

    @classmethod
    def of(cls, segments, positions, window: int | None = None, later=None) -> Self:
        """The spec of a sequence that attends to itself; segments, positions and `later` are int32[batch, n].

        `later` says where the order goes up, as in big_vision's `mask_ar`: 1 where a token is hidden from
        those before it, 0 where it belongs to the block of the token before it, whose tokens all see each
        other. None means 1 everywhere, which is causal. So 0 0 0 1 1 is a prefix of three tokens that see
        each other, and two causal tokens.
        """
        order = None if later is None else jnp.cumsum(later, axis=1)
        return cls(Places(segments, positions, order), window=window)

    def within(self, length: int) -> int | None:
        """The window, or None if it hides nothing in rows of `length` that attend to themselves."""
        return None if self.window is None or self.window >= length else self.window

    def mask(self):
        """The dense mask bool[batch, query, key], or None if nothing is hidden.

        Two dialogues and a pad in one row (segments 1 1 2 2 0) give

        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . . . .
        """
        if self.query is None or self.seen is not None:
            return self.seen
        q, k = self.query, self.query if self.key is None else self.key
        side = lambda a, b: (a[:, :, None], b[:, None, :])
        (of_q, of_k), (mine, other) = side(q.segments, k.segments), side(q.numbers, k.numbers)
        seen = (of_q == of_k) & (of_k > 0) & (other <= mine)
        if self.window is None:
            return seen
        here, there = side(q.positions, k.positions)
        return seen & (here - there < self.window)


EVERYTHING = AttentionSpec()


def attend(q, k, v, spec: AttentionSpec = EVERYTHING, dropout=(0.0, None)):
    """Softmax attention under `spec`, by the kernel that it names, or else by one that `using` allows.

    q [batch, kv_heads, group, query, head_dim], k and v [batch, kv_heads, key, head_dim]; `dropout` is the
    (rate, key) of dropout on the probabilities. Returns an array of q's shape. What a row of padding gives
    is finite, and differs between kernels.

    Raises:
      ConfigError: the kernel is unknown, or cannot do what is asked of it.
    """
    choice = NOW.value if spec.kernel is None else Choice(spec.kernel)
    return choice.take(need(q, k, spec, dropout, choice.packed)).run(q, k, v, spec, dropout)


def need(q, k, spec, dropout, packed) -> Need:
    """What attention of these arrays under `spec` asks of a kernel; `packed` is that of a Choice."""
    (rate, key), (queries, head_dim), keys = dropout, q.shape[-2:], k.shape[-2]
    cache = spec.key is not None or spec.seen is not None
    if spec.seen is not None:
        hidden, packed, window = "others", False, None
    elif spec.query is None:
        hidden, packed, window = "nothing", False, None
    else:
        hidden, window = "later" if spec.query.order is None else "blocks", spec.within(keys)
    rate = 0.0 if key is None else rate
    return Need(str(q.dtype), head_dim, queries, keys, hidden, packed, window, rate, cache)


def dense(q, k, v, spec, dropout):
    """The kernel that makes an array of the scores; scores and softmax are float32.

    Of a causal sequence, whose positions rise along each segment, it takes a block of queries at a time, with
    the keys up to the end of the block.

    In a padding row everything is masked. Masked scores are the smallest finite number rather than minus
    infinity, which would make such a row NaN and reach real rows through 0 * NaN.
    """
    length, mask = q.shape[-2], spec.mask()
    causal = spec.query is not None and spec.query.order is None and spec.key is None and spec.seen is None
    count = min(BLOCKS, -(-length // BLOCK)) if causal else 1
    size = -(-length // count)  # rounded up
    outs = []
    for number, start in enumerate(range(0, length, size)):
        end = min(start + size, length)
        seen = end if causal else k.shape[-2]
        hidden = None if mask is None else ~mask[:, start:end, :seen]
        rate, key = dropout
        key = key if key is None or count == 1 else jax.random.fold_in(key, number)
        outs.append(scored(q[..., start:end, :], k[:, :, :seen], v[:, :, :seen], hidden, (rate, key)))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=-2)


def scored(q, k, v, hidden, dropout):
    """Attention of queries [batch, kv_heads, group, n, head_dim] to keys, but where `hidden` [batch, n, key].

    The queries of a group are one sequence in the products: XLA transposes operands with more dimensions.
    """
    batch, heads, group, n, size = q.shape
    merged = lambda a: a.reshape(batch, heads, group * n, a.shape[-1])
    split = lambda a: a.reshape(batch, heads, group, n, a.shape[-1])
    scores = jnp.einsum("bktd,bksd->bkts", merged(q), k, preferred_element_type=jnp.float32) * size**-0.5
    if hidden is not None:
        scores = merged(jnp.where(hidden[:, None, None], jnp.finfo(jnp.float32).min, split(scores)))
    probabilities = drop(jax.nn.softmax(scores, axis=-1).astype(v.dtype), *dropout)
    return split(jnp.einsum("bkts,bksd->bktd", probabilities, v))


KERNELS["dense"] = Kernel(dense)
