"""Decoding: one program reads the prompts, another generates tokens.

Both serve batches and streams, greedy decoding, sampling and beam search. Prompts are padded on the left,
so that all rows write their next token at the same index of the cache.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnifusion_jax.inference.beam import Beams
from omnifusion_jax.inference.logits import Knobs, Rules
from omnifusion_jax.inference.sampling import Draws, keys
from omnifusion_jax.nn.attend import AttentionSpec, Places
from omnifusion_jax.sharding import constrain


class State(NamedTuple):
    """All that decoding keeps between two tokens. Each beam is a row here: `rows` is batch * beams."""

    step: jax.Array  # int32[]: tokens chosen so far
    knobs: Knobs
    cache: list  # one (key, value) pair for each layer, [rows, kv_heads, prompt + room, head_dim]
    segments: jax.Array  # int32[rows, prompt + room]; 0 is padding before a prompt
    positions: jax.Array  # int32[rows, prompt + room]
    search: Draws | Beams


@jax.jit
def embed(model, batch):
    """Token embeddings [batch, seq, width] of a `batch.Batch`.

    The encoders and adapters run here, once for each request.
    """
    return model.embed(batch)


@partial(jax.jit, static_argnames="rules")
def start(decoder, x, segments, positions, words, knobs: Knobs, rules: Rules) -> State:
    """Reads the prompts and chooses the first token of each answer.

    `x` is [batch, prompt, width]; segments and positions are int32[batch, prompt]. All are padded on the
    left; a row that is all padding is blank and stays so. `decoder` has its layers in list form. `words`,
    uint32[batch, 2], stand for the requests (see `sampling.words`).
    """
    beams, room = rules.num_beams, rules.room
    c, (batch, prompt) = decoder.config, segments.shape
    empty, first = decoder.init_cache(batch, prompt, x.dtype), jnp.zeros(batch, jnp.int32)
    hidden, cache = decoder(x, AttentionSpec.of(segments, positions, c.window), spread(empty), first)

    def widen(a):  # a prompt is read once, and every beam gets a copy
        return jnp.repeat(a, beams, axis=0)

    def lengthen(a):
        return widen(jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0))))

    search = (Beams if beams > 1 else Draws).start(~segments.any(1), keys(knobs.seed, words), rules)
    search = search.choose(widen(decoder.logits(hidden[:, -1])), 0, knobs, rules)
    return State(
        step=jnp.int32(1),
        knobs=knobs,
        cache=spread(jax.tree.map(lengthen, cache)),
        # Slots of the cache that are not written yet lie in the future of every query, so causal attention
        # hides them; segments and positions therefore never change.
        segments=widen(jnp.pad(segments, ((0, 0), (0, room)), constant_values=1)),
        positions=widen(jnp.concatenate([positions, positions[:, -1:] + 1 + jnp.arange(room)], axis=1)),
        search=search,
    )


@partial(jax.jit, static_argnames="rules", donate_argnames="state")
def advance(decoder, state: State, until, rules: Rules) -> State:
    """Chooses tokens until every row is done or has `until` of them.

    For whole answers `until` is the limit of tokens, in a stream it is `state.step + 1`. `state` is
    donated: its arrays cannot be used afterwards.
    """
    prompt = state.segments.shape[1] - rules.room

    def going(state):
        return (state.step < jnp.minimum(until, state.knobs.limit)) & ~state.search.done.all()

    def body(state):
        # The cache is reordered before anything is written; otherwise XLA would copy all of it.
        cache = reorder(state.cache, state.search.parents, prompt)
        at = jnp.full(len(state.positions), prompt + state.step - 1)
        x = decoder.embed_tokens(state.search.last(state.step))[:, None]  # [rows, 1, width]
        here = jnp.take_along_axis(state.positions, at[:, None], axis=1)
        query = Places(jnp.ones_like(here), here)
        key = Places(state.segments, state.positions)
        spec = AttentionSpec(query, key, decoder.config.window)
        hidden, cache = decoder(x, spec, cache, at)
        search = state.search.choose(decoder.logits(hidden[:, 0]), state.step, state.knobs, rules)
        return state._replace(step=state.step + 1, cache=spread(cache), search=search)

    return jax.lax.while_loop(going, body, state)


def spread(cache):
    """Spreads rows and heads of the cache over the devices of a mesh; without a mesh it changes nothing."""
    return jax.tree.map(lambda a: constrain(a, "batch", "kv_heads", None, None), cache)


def reorder(cache, parents, prompt):
    """Gives each row the cache of its parent.

    Beams of one request share the cache of its prompt, so only what follows the prompt moves.
    """
    if parents is None:
        return cache
    return jax.tree.map(lambda a: a.at[:, :, prompt:].set(a[:, :, prompt:][parents]), cache)
