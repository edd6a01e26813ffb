"""The sampler: one program reads the prompts, one writes tokens. Both serve batches, streams, greedy decoding, sampling and beams.

Prompts stand at the right end of their rows, so that all rows write their next token at the same index of the cache.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnifusion_jax.inference.beam import Beams
from omnifusion_jax.inference.logits import Knobs
from omnifusion_jax.inference.sampling import Draws, keys
from omnifusion_jax.nn.attend import AttentionSpec, Places
from omnifusion_jax.sharding import constrain


class State(NamedTuple):
    """Everything between two tokens. A beam is a row of its own here: `rows` is batch * beams."""

    step: jax.Array  # int32[]: tokens chosen so far
    knobs: Knobs
    cache: list  # one (key, value) pair a layer, [rows, kv_heads, prompt + room, head_dim]
    segments: jax.Array  # int32[rows, prompt + room]; 0 is padding before a prompt
    positions: jax.Array  # int32[rows, prompt + room]
    search: Draws | Beams


@jax.jit
def embed(model, batch):
    """Token embeddings [rows, seq, width] of a `batch.Batch`: the encoder and the adapter run here, once a request."""
    return model.embed(batch)


@partial(jax.jit, static_argnames="rules")
def start(decoder, x, segments, positions, words, knobs, rules):
    """Reads the prompts and chooses each one's first token.

    x [batch, prompt, width] and int32[batch, prompt] of segments and positions, padded on the left; a row
    without segments is blank and stays so. `decoder` has its layers in list form. `words` uint32[batch, 2]
    stand for the requests, see `sampling.words`.
    """
    beams, room = rules.num_beams, rules.room
    c, (batch, prompt) = decoder.config, segments.shape
    empty, first = decoder.init_cache(batch, prompt, x.dtype), jnp.zeros(batch, jnp.int32)
    hidden, cache = decoder(x, AttentionSpec.of(segments, positions, c.window), spread(empty), first)

    def widen(a):  # a prompt is read once, then every beam gets its copy
        return jnp.repeat(a, beams, axis=0)

    search = (Beams if beams > 1 else Draws).start(~segments.any(1), keys(knobs.seed, words), rules)
    search = search.choose(widen(decoder.logits(hidden[:, -1])), 0, knobs, rules)
    return State(
        step=jnp.int32(1),
        knobs=knobs,
        cache=spread(jax.tree.map(lambda a: widen(jnp.pad(a, ((0, 0), (0, 0), (0, room), (0, 0)))), cache)),
        # Slots that are not written yet lie in the future of every query: causality hides them, so these two never change.
        segments=widen(jnp.pad(segments, ((0, 0), (0, room)), constant_values=1)),
        positions=widen(jnp.concatenate([positions, positions[:, -1:] + 1 + jnp.arange(room)], axis=1)),
        search=search,
    )


@partial(jax.jit, static_argnames="rules", donate_argnames="state")
def advance(decoder, state, until, rules):
    """Chooses tokens until every row is done or `until` of them are there: the limit for whole answers, one more than `state.step` in a stream.

    `state` is donated: what it held is gone.
    """
    prompt = state.segments.shape[1] - rules.room

    def going(state):
        return (state.step < jnp.minimum(until, state.knobs.limit)) & ~state.search.done.all()

    def body(state):
        cache = reorder(
            state.cache, state.search.parents, prompt
        )  # before anything is written: done after, XLA would copy the whole cache
        at = jnp.full(len(state.positions), prompt + state.step - 1)
        x = decoder.embed_tokens(state.search.last(state.step))[:, None]  # [rows, 1, width]
        here = jnp.take_along_axis(state.positions, at[:, None], axis=1)
        query = Places(jnp.ones_like(here), here, here)
        spec = AttentionSpec(
            query, Places(state.segments, state.positions, state.positions), decoder.config.window
        )
        hidden, cache = decoder(x, spec, cache, at)
        search = state.search.choose(decoder.logits(hidden[:, 0]), state.step, state.knobs, rules)
        return state._replace(step=state.step + 1, cache=spread(cache), search=search)

    return jax.lax.while_loop(going, body, state)


def spread(cache):
    """The cache over the devices of a mesh, rows and heads apart; without a mesh as it is."""
    return jax.tree.map(lambda a: constrain(a, "batch", "kv_heads", None, None), cache)


def reorder(cache, parents, prompt):
    """Each row's cache becomes that of its parent. Beams of one request share its prompt, so only what follows it moves."""
    if parents is None:
        return cache
    return jax.tree.map(lambda a: a.at[:, :, prompt:].set(a[:, :, prompt:][parents]), cache)
