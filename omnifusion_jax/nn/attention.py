"""Attention as a module, of a sequence to itself or to another one."""

import jax
import jax.numpy as jnp

from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import EVERYTHING, attend
from omnifusion_jax.nn.init import INITS
from omnifusion_jax.nn.kept import dtype_of, kept, seen
from omnifusion_jax.nn.linear import Linear

PROJECTIONS = ("query", "key", "value", "out")


class Attention(nnx.Module):
    """Multi-head attention, with grouped queries if `kv_heads` is given (arXiv 2305.13245).

    Kernels are [width, heads, head_dim]. With grouped queries, the kernel of queries is
    [width, kv_heads, group, head_dim], where group = heads / kv_heads.

    Where a model answers, the maps that are `together` may be one, `joined`, with outputs
    [kv_heads, group + 2, head_dim]: for each head of keys its queries, the key and the value.
    """

    joined = None

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int | None = None,
        kv_heads: int | None = None,
        bias=PROJECTIONS,
        norm=None,
        init=INITS["normal"],
        *,
        rngs: nnx.Rngs,
    ):
        """`bias` names the projections that have one.

        `norm()` makes a module that normalises queries or keys, [batch, heads..., seq, head_dim], before
        they are rotated.
        """
        size = head_dim or width // heads
        grouped = (heads,) if kv_heads is None else (kv_heads, heads // kv_heads)
        self.together = () if kv_heads is None else PROJECTIONS[:3]
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
        """Maps x [batch, seq, width] to (y [batch, seq, width], cache).

        Args:
          context: [batch, keys, width] from which keys are made; None: x itself. With a context, x may be
            one row for the whole batch.
          values: [batch, keys, width] from which values are made; None: `context`.
          turn: rotates queries and keys, [batch, heads..., seq, head_dim], by their positions; None: no
            rotation.
          cache: a pair [batch, kv_heads, length, head_dim] of earlier keys and values, as `nn.kept` keeps
            them, or None. Row b of the new keys and values is written from index `at[b]` (int32[batch]) on,
            and queries see the whole cache.
          dropout: (rate, key) of dropout on the probabilities.
        """
        q, k, v = self.projections(x, context, values)
        q, k, v = heads(q, self.query_norm, turn), heads(k, self.key_norm, turn), heads(v)
        if cache is not None:
            cache = tuple(write(old, new, at) for old, new in zip(cache, (k, v), strict=True))
            k, v = (seen(a, v.dtype) for a in cache)
        ungrouped = q.ndim == 4  # one query head for each key head; `attend` takes it as a group of one
        q = jnp.expand_dims(q, 2) if ungrouped else q
        y = attend(jnp.broadcast_to(q, (len(k), *q.shape[1:])), k, v, spec, dropout)
        y = y[:, :, 0] if ungrouped else y
        return self.out(jnp.moveaxis(y, -2, 1)), cache

    def projections(self, x, context, values):
        """Queries, keys and values, [batch, seq, heads..., head_dim]."""
        if self.joined is not None:
            y = self.joined(x)
            return y[..., :-2, :], y[..., -2, :], y[..., -1, :]
        context = x if context is None else context
        return self.query(x), self.key(context), self.value(context if values is None else values)


def heads(x, norm=None, turn=None):
    """Moves heads before the sequence, [batch, heads..., seq, head_dim], then normalises and rotates."""
    x = jnp.moveaxis(x, 1, -2)
    x = x if norm is None else norm(x)
    return x if turn is None else turn(x)


def write(cache, new, at):
    """The cache [batch, heads, length, head_dim] with `new` [batch, heads, n, head_dim] written into it.

    Row b is written from index `at[b]` on, in the form of the cache.
    """
    put = lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new, at, axis=1)
    one = lambda old, new: put(old[0], new[0], at[0])[None]  # in place, see `bare` of the engine's programs
    several = lambda old, new: jax.vmap(put)(old, new, at)
    return jax.tree.map(one if len(at) == 1 else several, cache, kept(new, dtype_of(cache)))
