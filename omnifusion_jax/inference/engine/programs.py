"""The programs of an engine: what runs on the device.

`encode` makes feature rows of media, `extend` reads a piece of some prompts, `advance` chooses tokens in all
slots. A slot has its prompt in the first columns of its cache and its answer in those that follow. All of a
prompt but its last position is read by `extend`; that one waits as an embedding, and `advance` begins the
answer with it, so that one program alone makes scores.

A search with n beams is in one slot, and has n rows of what is chosen. Then answers have columns of their own
behind all those of prompts, n for each token, one of each row, and `origin` says for each row in which of
them its own text stands. So the prompt is kept and read once for all beams, and nothing moves when one text
is continued twice and another is lost. All slots have as many rows, those of `Sizes.beams`; row b of slot i
is number i * beams + b.

Where attention has a window, prompts need no more columns than that and two of their pieces: then these are a
ring, in which position p stands in column p modulo their number, in place of what no query sees any more.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from omnifusion_jax.batch import FEATURE, SPECIAL
from omnifusion_jax.inference.options import Options, Sizes
from omnifusion_jax.inference.search import Search, Texts
from omnifusion_jax.models.contracts import Cache
from omnifusion_jax.nn.attend import AttentionSpec, Places
from omnifusion_jax.nn.kept import dtype_of
from omnifusion_jax.sharding import constrain


class State(NamedTuple):
    """All that stays on the device from call to call. It is donated: there is one of it at any time."""

    cache: Cache  # a (key, value) pair for each layer, [slots, kv_heads, length, head_dim], see nn/kept.py
    pending: jax.Array  # [slots, width]: the last position of each prompt, not yet read
    search: Search  # of all rows
    # int32[rows, room]: the beam in whose column each token of a row's text stands; of one beam [rows, 0]
    origin: jax.Array

    @property
    def front(self) -> int:
        """Columns of a prompt, and of an answer in one row."""
        return columns(self.cache) - self.origin.size // len(self.pending)


class Rows(NamedTuple):
    """What the host says of slots and rows."""

    # int32[slots]: columns of the prompt that are read; where none is decoded, the first that means nothing
    read: jax.Array
    active: jax.Array  # bool[rows]: the row is decoded; then so is the first of its slot
    fresh: jax.Array  # bool[rows]: its answer begins


class Chunk(NamedTuple):
    """Pieces of `n` prompts, one of each, and the position that follows it."""

    slots: jax.Array | None  # int32[n]: where each belongs; None: piece i belongs to slot i, of all
    active: jax.Array  # bool[n]: false of a slot that this does not concern
    start: jax.Array  # int32[n]: the column of its first position
    count: jax.Array  # int32[n]: its positions; the one at this place is the last of the prompt, or read next
    tokens: jax.Array  # int32[n, size + 1]; `kind` and `index` as in a Batch,
    kind: jax.Array  # int32[n, size + 1]
    index: jax.Array  # int32[n, size + 1]: but feature rows are counted through all that are kept


class Report(NamedTuple):
    """What the host reads after a call of `advance`, [rows] each."""

    last: jax.Array  # int32: the token chosen last
    parents: jax.Array  # int32: the row whose text it continued
    length: jax.Array  # int32: tokens chosen
    done: jax.Array  # bool
    broken: jax.Array  # bool: the model's scores were not numbers
    stuck: jax.Array  # bool: no token was allowed


@partial(jax.jit, static_argnames=("slots", "length", "sizes", "dtype"))
def start(decoder, slots: int, length: int, sizes: Sizes, dtype=None) -> State:
    """A State of slots that hold nothing, with `length` columns.

    `dtype` is that of the cache; None: that of the decoder.
    """
    pending = jnp.zeros((slots, decoder.config.width), decoder.dtype)
    cache = decoder.init_cache(slots, length, dtype or decoder.dtype)
    return State(spread(cache), pending, *nobody(slots * sizes.beams, sizes))


def nobody(rows: int, sizes: Sizes):
    """The Search, and the origins, of rows that hold nothing."""
    return Search.start(rows, sizes), jnp.zeros((rows, sizes.room if sizes.beams > 1 else 0), jnp.int32)


@partial(jax.jit, static_argnames=("slots", "length", "sizes"))
def grow(state: State, slots: int, length: int, sizes: Sizes) -> State:
    """The State with more slots, or longer ones."""
    more, longer = slots - len(state.pending), length - columns(state.cache)
    widths = ((0, more), (0, 0), (0, longer), (0, 0))
    return State(
        spread(jax.tree.map(lambda a: jnp.pad(a, widths), state.cache)),
        jnp.pad(state.pending, widths[:2]),
        *jax.tree.map(
            lambda old, new: new.at[: len(old)].set(old),
            (state.search, state.origin),
            nobody(slots * sizes.beams, sizes),
        ),
    )


@partial(jax.jit, donate_argnames="kept")
def encode(stream, kept, media, places):
    """Encodes tiles of media and keeps their feature rows.

    `kept` is [places, rows, width], `media` an array [n, ...] for each view of the `stream`, and `places`
    int32[n] where the rows of each tile go; a tile whose place is beyond all is left out.
    """
    media = [constrain(view[:, None], "batch", *(None,) * view.ndim) for view in media]
    rows = stream(media)  # [n, rows, width]
    return constrain(kept.at[places].set(rows.astype(kept.dtype), mode="drop"), None, None, None)


@partial(jax.jit, static_argnames="fresh", donate_argnames="state")
def extend(module, kept, state: State, chunk: Chunk, fresh: bool) -> State:
    """Reads pieces of prompts into the cache.

    `kept` has the feature rows of each stream, [places, rows, width]. `fresh` says that no row holds
    anything before its piece; then the cache is not looked at.
    """
    x = embed(module, kept, chunk)  # [n, size + 1, width]
    last = jnp.take_along_axis(x, chunk.count[:, None, None], axis=1)[:, 0]
    cache = state.cache
    if x.shape[1] > 1:
        new = read(module.decoder, x[:, :-1], cache, state.front, chunk, fresh)
        where = chunk.slots, chunk.start, jnp.where(chunk.active, chunk.count, 0)
        put = lambda old, new: write(old, new, *where, ring_of(state, module.decoder))
        cache = jax.tree.map(put, cache, new)
    if chunk.slots is None:
        pending = jnp.where(chunk.active[:, None], last, state.pending)
    else:
        pending = state.pending.at[chunk.slots].set(last)
    return state._replace(cache=spread(cache), pending=pending)


def embed(module, kept, chunk):
    """Embeddings [n, size + 1, width] of a Chunk."""
    x = module.decoder.embed_tokens(chunk.tokens)
    sources = [] if module.special is None else [(SPECIAL, module.special())]
    sources += [(FEATURE + number, rows.reshape(-1, x.shape[-1])) for number, rows in enumerate(kept)]
    for kind, rows in sources:
        here = chunk.kind == kind
        x = jnp.where(here[..., None], rows[jnp.where(here, chunk.index, 0)].astype(x.dtype), x)
    return x


def read(decoder, x, cache, front, chunk, fresh):
    """Keys and values of embeddings [n, size, width], a pair [n, kv_heads, size, head_dim] for each layer.

    They are in the form of the cache, whose first columns, `front`, hold what stands before them.
    """
    (n, size, _), window = x.shape, decoder.config.window
    places = Places(
        (jnp.arange(size) < chunk.count[:, None]).astype(jnp.int32), chunk.start[:, None] + jnp.arange(size)
    )
    if fresh:
        empty = spread(decoder.init_cache(n, size, dtype_of(cache)))
        return decoder(x, AttentionSpec(places, window=window), empty, jnp.zeros(n, jnp.int32))[1]
    own = slice(None) if chunk.slots is None else chunk.slots
    cache = jax.tree.map(lambda a: a[own, :, :front], cache)
    # The piece stands behind what is there already: in a ring, its queries still see what it will replace.
    before = held(front, chunk.start - 1)
    keys = Places(*(jnp.concatenate(pair, axis=1) for pair in zip(before[:2], places[:2], strict=True)))
    longer = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, 0), (0, size), (0, 0))), cache)
    found = decoder(x, AttentionSpec(places, keys, window), spread(longer), jnp.full(n, front))[1]
    return jax.tree.map(lambda a: a[:, :, front:], found)


def write(old, new, slots, start, count, ring):
    """A cache [slots, kv_heads, length, head_dim] with pieces [n, kv_heads, size, head_dim] in some slots.

    `slots` as in a Chunk; of each piece `count` positions are written, int32[n], from `start` on, in a ring
    of so many columns or, if it is None, in none.
    """
    size = new.shape[2]

    def put(old, new, here, mine):
        there = jax.lax.dynamic_slice(old, here, (1, *new.shape[1:]))
        return jax.lax.dynamic_update_slice(old, jnp.where(mine[:, None], new, there), here)

    def whole(old, new, slot, start, count):
        if ring is None:
            return put(old, new, (slot, 0, start, 0), jnp.arange(size) < count)
        # What finds no room before the last column goes on at the first.
        for at in (jnp.minimum(start % ring, ring - size), 0):
            place = (at + jnp.arange(size) - start) % ring  # of the piece, that belongs there
            turned = jnp.take(new, place, axis=2, mode="clip")
            old = put(old, turned, (slot, 0, at, 0), place < count)
        return old

    if slots is None:
        alone = lambda old, new, start, count: whole(old[None], new[None], 0, start, count)[0]
        return jax.vmap(alone)(old, new, start, count)
    for i in range(len(new)):
        old = whole(old, new[i : i + 1], slots[i], start[i], count[i])
    return old


@partial(jax.jit, donate_argnames="state")
def copy(state: State, source, target) -> State:
    """The State with all that slot `source` holds of a prompt in slot `target` too."""

    def move(a):
        slot = jax.lax.dynamic_slice_in_dim(a, source, 1)
        return jax.lax.dynamic_update_slice_in_dim(a, slot, target, 0)

    return state._replace(cache=spread(jax.tree.map(move, state.cache)), pending=move(state.pending))


@partial(jax.jit, donate_argnames="state")
def clear(state: State, slot) -> State:
    """The State with a slot that holds nothing: what is not a number would reach its next prompt."""
    blank = lambda a: jax.lax.dynamic_update_slice_in_dim(a, jnp.zeros_like(a[:1]), slot, 0)
    return state._replace(cache=spread(jax.tree.map(blank, state.cache)), pending=blank(state.pending))


@partial(jax.jit, static_argnames="sizes", donate_argnames="state")
def advance(decoder, state: State, rows: Rows, options: Options, count, eager, sizes: Sizes):
    """Chooses up to `count` tokens in every active row, fewer if all are done before.

    With `eager` it stops as soon as an answer is finished. Returns the State and a Report.
    """
    state = state._replace(search=state.search.restart(rows.fresh, options))
    first = rows.active & ~state.search.done

    def going(carry):
        step, state = carry
        alive = first & ~state.search.done
        return (step < count) & alive.any() & ~(eager & (alive != first).any())

    def body(carry):
        step, state = carry
        state = framed(state)
        search, beams = state.search, sizes.beams
        by_slot = lambda a: a.reshape(-1, beams, *a.shape[1:])  # [slots, beams, ...] of [rows, ...]
        x = by_slot(decoder.embed_tokens(search.last()))
        x = jnp.where(by_slot(search.length)[..., None] > 0, x, state.pending[:, None])
        chosen = by_slot(jnp.where(rows.active, search.length, 0))[:, 0]  # tokens of the answer in each slot
        position = jnp.broadcast_to((rows.read + chosen)[:, None], x.shape[:2])
        query, window, origin = Places(jnp.ones_like(position), position), decoder.config.window, state.origin
        if beams == 1:
            at = position[:, 0]
            spec = AttentionSpec(query, held(state.front, at), window)
            at = at if (ring := ring_of(state, decoder)) is None else at % ring
        else:
            origin = inherited(origin, search, beams)
            prompt = AttentionSpec(query, held(state.front, rows.read - 1), window).mask()
            answer = branches(by_slot(origin), chosen, window)
            spec = AttentionSpec(query, seen=jnp.concatenate([prompt, answer], axis=2))
            at = state.front + chosen * beams
        hidden, cache = decoder(x, spec, state.cache, at)
        logits = decoder.logits(hidden.reshape(-1, hidden.shape[-1]))
        search = search.choose(logits, options, sizes, rows.active)
        return step + 1, bare(State(spread(cache), state.pending, search, origin))

    _, state = jax.lax.while_loop(going, body, (jnp.int32(0), bare(state)))
    state = framed(state)
    search = state.search
    told = Report(search.last(), search.parents, search.length, search.done, search.broken, search.stuck)
    return state, jax.tree.map(lambda a: constrain(a, None), told)


def inherited(origin, search: Search, beams: int):
    """The origins of rows that continue their parents by a token which stands in their own column."""
    row = jnp.arange(len(origin))
    return origin[search.parents].at[row, search.length].set(row % beams)


def branches(origin, chosen, window: int | None):
    """What each beam sees of the columns of its answer, bool[slots, beams, room * beams].

    Of the `chosen` tokens, int32[slots], and of the next one, these are the columns where its own text stands
    by `origin`, int32[slots, beams, room].
    """
    beams, room = origin.shape[1:]
    back = chosen[:, None] - jnp.arange(room)  # positions, from that of the query
    seen = (back >= 0) if window is None else (back >= 0) & (back < window)
    own = (origin[..., None] == jnp.arange(beams)) & seen[:, None, :, None]
    return own.reshape(*origin.shape[:2], room * beams)


def bare(state: State) -> State:
    """The State with a cache [kv_heads, length, head_dim], if there is one slot; `framed` undoes it.

    XLA multiplies with heads and slots as one axis. From a loop that carries the axis of one slot it would
    take the write into the cache as two, one for each of both forms, and copy all of it in every step.
    """
    alone = len(state.pending) == 1
    return state._replace(cache=jax.tree.map(lambda a: a[0], state.cache)) if alone else state


def framed(state: State) -> State:
    """The State whose cache has the axis of its slots again, see `bare`."""
    alone = len(state.pending) == 1
    return state._replace(cache=jax.tree.map(lambda a: a[None], state.cache)) if alone else state


@jax.jit
def answers(search: Search, options: Options) -> Texts:
    """The answers of all rows, as `Search.answers` gives them, whole on every device."""
    return jax.tree.map(lambda a: constrain(a, *(None,) * a.ndim), search.answers(options))


def held(length: int, last) -> Places:
    """What `length` columns hold, as the keys of a spec; `last`, int32[slots], is the last position."""
    last = last[:, None]
    column, newest = jnp.arange(length), last % length
    positions = last - newest + jnp.where(column > newest, column - length, column)
    return Places((positions >= 0).astype(jnp.int32), positions)


def ring_of(state: State, decoder) -> int | None:
    """Columns of the ring, if there may be fewer than a slot has seen."""
    window = decoder.config.window
    return state.front if window is not None and state.front > window else None


def columns(cache) -> int:
    """The length of the slots of a cache."""
    return jax.tree.leaves(cache)[0].shape[2]


def spread(cache):
    """Spreads slots and heads of the cache over the devices of a mesh; without a mesh it changes nothing."""
    return jax.tree.map(lambda a: constrain(a, "batch", "kv_heads", None, None), cache)
