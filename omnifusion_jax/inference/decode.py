"""Decoding: one program reads the prompts, another generates tokens.

Both serve batches and streams, greedy decoding, sampling and beam search. Prompts are padded on the left,
so that all rows write their next token at the same index of the cache.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnifusion_jax.inference.options import Options, Sizes
from omnifusion_jax.inference.search import Search
from omnifusion_jax.nn.attend import AttentionSpec, Places
from omnifusion_jax.sharding import constrain


class State(NamedTuple):
    """All that decoding keeps between two tokens. Each beam is a row here: `rows` is batch * beams."""

    options: Options
    cache: list  # one (key, value) pair for each layer, [rows, kv_heads, prompt + room, head_dim]
    segments: jax.Array  # int32[rows, prompt + room]; 0 is padding before a prompt
    positions: jax.Array  # int32[rows, prompt + room]
    search: Search


@jax.jit
def embed(model, batch):
    """Token embeddings [batch, seq, width] of a `batch.Batch`.

    The encoders and adapters run here, once for each request.
    """
    return model.embed(batch)


@partial(jax.jit, static_argnames="sizes")
def start(decoder, x, segments, positions, options: Options, sizes: Sizes) -> State:
    """Reads the prompts and chooses the first token of each answer.

    `x` is [batch, prompt, width]; segments and positions are int32[batch, prompt]. All are padded on the
    left; a row that is all padding is blank and stays so. `decoder` has its layers in list form. `options`
    are those of the rows, of which every prompt has equally many.
    """
    beams, room = len(options.limit) // len(x), sizes.room
    c, (batch, prompt) = decoder.config, segments.shape
    empty, first = decoder.init_cache(batch, prompt, x.dtype), jnp.zeros(batch, jnp.int32)
    hidden, cache = decoder(x, AttentionSpec.of(segments, positions, c.window), spread(empty), first)

    def widen(a):  # a prompt is read once, and every beam gets a copy
        return jnp.repeat(a, beams, axis=0)

    def lengthen(a):
        return widen(jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0))))

    search = Search.start(batch * beams, sizes).restart(widen(segments.any(1)), options)
    search = search.choose(widen(decoder.logits(hidden[:, -1])), options, sizes)
    return State(
        options=options,
        cache=spread(jax.tree.map(lengthen, cache)),
        # Slots of the cache that are not written yet lie in the future of every query, so causal attention
        # hides them; segments and positions therefore never change.
        segments=widen(jnp.pad(segments, ((0, 0), (0, room)), constant_values=1)),
        positions=widen(jnp.concatenate([positions, positions[:, -1:] + 1 + jnp.arange(room)], axis=1)),
        search=search,
    )


@partial(jax.jit, static_argnames="sizes", donate_argnames="state")
def advance(decoder, state: State, until, sizes: Sizes) -> State:
    """Chooses tokens until every row is done or has `until` of them.

    For whole answers `until` is the limit of tokens, in a stream it is one more than there are. `state` is
    donated: its arrays cannot be used afterwards.
    """
    prompt = state.segments.shape[1] - sizes.room

    def going(state):
        return (~state.search.done & (state.search.length < until)).any()

    def body(state):
        search = state.search
        # The cache is reordered before anything is written; otherwise XLA would copy all of it.
        cache = state.cache if sizes.beams == 1 else reorder(state.cache, search.parents, prompt)
        # A row that is done writes once more what it wrote last, which nobody reads.
        at = prompt + jnp.maximum(search.length, 1) - 1
        x = decoder.embed_tokens(search.last())[:, None]  # [rows, 1, width]
        here = jnp.take_along_axis(state.positions, at[:, None], axis=1)
        query = Places(jnp.ones_like(here), here)
        key = Places(state.segments, state.positions)
        spec = AttentionSpec(query, key, decoder.config.window)
        hidden, cache = decoder(x, spec, cache, at)
        search = search.choose(decoder.logits(hidden[:, 0]), state.options, sizes)
        return state._replace(cache=spread(cache), search=search)

    return jax.lax.while_loop(going, body, state)


def spread(cache):
    """Spreads rows and heads of the cache over the devices of a mesh; without a mesh it changes nothing."""
    return jax.tree.map(lambda a: constrain(a, "batch", "kv_heads", None, None), cache)


def reorder(cache, parents, prompt):
    """Gives each row the cache of its parent.

    Beams of one request share the cache of its prompt, so only what follows the prompt moves.
    """
    return jax.tree.map(lambda a: a.at[:, :, prompt:].set(a[:, :, prompt:][parents]), cache)
