"""Attention as a module: of a sequence to itself, or to another one."""

import jax
import jax.numpy as jnp

from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import EVERYTHING, attend
from omnifusion_jax.nn.init import INITS
from omnifusion_jax.nn.linear import Linear

PROJECTIONS = ("query", "key", "value", "out")


class Attention(nnx.Module):
    """Multi-head attention; grouped queries where `kv_heads` is given (arXiv 2305.13245), group = heads / kv_heads.

    Kernels are [width, heads, head_dim]; with groups that of queries is [width, kv_heads, group, head_dim].
    """

    def __init__(
        self,
        width,
        heads,
        head_dim=None,
        kv_heads=None,
        bias=PROJECTIONS,
        norm=None,
        init=INITS["normal"],
        *,
        rngs,
    ):
        """`bias`: the projections that have one. `norm()` makes what normalises queries, and keys, [batch, heads...,
        seq, head_dim], before they are turned."""
        size = head_dim or width // heads
        grouped = (heads,) if kv_heads is None else (kv_heads, heads // kv_heads)
        make = lambda name, ins, outs, init: Linear(ins, outs, name in bias, init, rngs=rngs)
        self.query = make("query", width, (*grouped, size), init.qkv)
        self.key = make("key", width, (*grouped[:1], size), init.qkv)
        self.value = make("value", width, (*grouped[:1], size), init.qkv)
        self.out = make("out", (*grouped, size), width, init.out)
        self.query_norm, self.key_norm = (norm and norm() for _ in range(2))

    def __call__(
        self,
        x,
        spec=EVERYTHING,
        context=None,
        values=None,
        turn=None,
        cache=None,
        at=None,
        dropout=(0.0, None),
    ):
        """x [batch, seq, width] to (y [batch, seq, width], cache).

        Args:
          context: [batch, keys, width], what is looked at; None: x itself. x may then be one row for the whole batch.
          values: [batch, keys, width], what is summed up where that is not what is looked at; None: `context`.
          turn: what rotates queries and keys, [batch, heads..., seq, head_dim]; None: nothing does.
          cache: a pair [batch, kv_heads, length, head_dim] of earlier keys and values, or None. Row b of the new ones is
            written from index `at[b]`, int32[batch], on, and all are looked at.
          dropout: (rate, key), of the probabilities.
        """
        context = x if context is None else context
        q = heads(self.query(x), self.query_norm, turn)
        k = heads(self.key(context), self.key_norm, turn)
        v = heads(self.value(context if values is None else values))
        if cache is not None:
            k, v = cache = tuple(write(old, new, at) for old, new in zip(cache, (k, v), strict=True))
        alone = q.ndim == 4  # a query head for every key head
        q = jnp.expand_dims(q, 2) if alone else q
        y = attend(jnp.broadcast_to(q, (len(k), *q.shape[1:])), k, v, spec, dropout)
        return self.out(jnp.moveaxis(y[:, :, 0] if alone else y, -2, 1)), cache


def heads(x, norm=None, turn=None):
    """[batch, seq, heads..., head_dim] to [batch, heads..., seq, head_dim]."""
    x = jnp.moveaxis(x, 1, -2)
    x = x if norm is None else norm(x)
    return x if turn is None else turn(x)


def write(cache, new, at):
    """`cache` [batch, heads, length, head_dim] with `new` [batch, heads, n, head_dim] from index at[b] of each row b on."""
    return jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1))(
        cache, new, at
    )
