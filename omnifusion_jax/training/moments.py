"""The moments of an optimizer in fewer bits.

A mean of squares that forgets at 0.999 changes by a thousandth a step, which is less than half the distance
between two numbers of bfloat16, or of 8 bits: rounded to the nearest it would never move again. So rounding
is stochastic. A number becomes one of its two neighbours, at random, so that on average it stays what it was.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

BIG = 4096  # moments of smaller parameters stay as they are: there is little to gain
BLOCK = 128  # numbers that share a scale; a row whose length is no multiple of it is one block
LEVELS = 127


class Blocks(NamedTuple):
    """Numbers in 8 bits each: scale * sign(code) * (|code| / 127)**4.

    The fourth power spreads 127 levels over eight decimal places. Evenly spread, they would make zeros of
    most second moments, and updates are divided by those. Scales for blocks are from arXiv 2110.02861.
    """

    codes: jax.Array  # int8, of the shape of the numbers
    scales: jax.Array  # float32[..., blocks]: the largest size in each block


class Kept(NamedTuple):
    """The state of a rule, its moments packed."""

    count: jax.Array  # int32: updates so far, of which each rounds by random numbers of its own
    rule: object


def parameter_of(path) -> str | None:
    """The name of the parameter that a leaf of an optimizer's state belongs to, by the leaf's path."""
    return next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)


def kept(kind: str, rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """An Optax rule that computes in float32 and keeps its moments as `kind`: float32, bfloat16 or int8.

    Moments are what has the name and the shape of a parameter. Random numbers follow from the count of
    updates, so that a resumed run draws those that it would have drawn.
    """
    if kind == "float32":
        return rule
    pack = PACK[kind]

    def packed(state, params, count):
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        seeds = jax.random.bits(jax.random.fold_in(jax.random.key(0), count), len(leaves))
        return tree.unflatten(
            pack(a, seed) if is_moment(path, a, params) else a
            for (path, a), seed in zip(leaves, seeds, strict=True)
        )

    def init(params):
        count = jnp.zeros((), jnp.int32)
        return Kept(count, packed(rule.init(params), params, count))

    def update(updates, state, params):
        updates, moments = rule.update(updates, unpacked(state.rule), params)
        return updates, Kept(state.count + 1, packed(moments, params, state.count + 1))

    return optax.GradientTransformation(init, update)


def is_moment(path, a, params) -> bool:
    name = parameter_of(path)
    return name in params and a.shape == params[name].shape and a.size >= BIG


def unpacked(state):
    """The state with moments in float32."""

    def unpack(a):
        if isinstance(a, Blocks):
            return from_int8(a)
        return a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a

    return jax.tree.map(unpack, state, is_leaf=lambda a: isinstance(a, Blocks))


def noise(shape, seed):
    """Random uint32[shape] that follow from `seed`, uint32[], and from the place of each.

    Three rounds of multiplication and shift (MurmurHash3's last step) rather than `jax.random`, which has
    twenty: they would take longer than the optimizer, and minutes to compile.
    """
    x = seed
    for axis in range(len(shape)):
        x = mixed(x ^ mixed(jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + jnp.uint32(axis + 1)))
    return x


def mixed(x):
    x = (x ^ x >> 16) * jnp.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * jnp.uint32(0xC2B2AE35)
    return x ^ x >> 16


def to_bfloat16(x, seed):
    """float32 to bfloat16: noise below its last bit is added, then cut off with all that is below it."""
    upper = (jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise(x.shape, seed) >> 16)) >> 16
    return jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)


def to_int8(x, seed):
    """float32 to Blocks. A number that is not zero never becomes zero."""
    parts = blocks(x)
    scales = jnp.abs(parts).max(axis=-1)
    size = jnp.abs(parts) / jnp.where(scales > 0, scales, 1)[..., None]  # from 0 to 1
    low = jnp.floor(LEVELS * jnp.sqrt(jnp.sqrt(size)))
    below, above = power(low), power(low + 1)
    drawn = noise(size.shape, seed).astype(jnp.float32) * 2.0**-32  # from 0 to 1
    code = low + (drawn * (above - below) < size - below)
    code = jnp.where(size > 0, jnp.clip(code, 1, LEVELS), 0) * jnp.sign(parts)
    return Blocks(code.astype(jnp.int8).reshape(x.shape), scales)


def from_int8(packed: Blocks):
    code = blocks(packed.codes).astype(jnp.float32)
    size = power(jnp.abs(code)) * packed.scales[..., None]
    return (jnp.sign(code) * size).reshape(packed.codes.shape)


def power(level):
    return jnp.square(jnp.square(level / LEVELS))


def blocks(x):
    """[..., n] to [..., blocks, n / blocks]"""
    length = x.shape[-1]
    block = length if length % BLOCK else BLOCK
    return x.reshape(*x.shape[:-1], length // block, block)


PACK = {"bfloat16": to_bfloat16, "int8": to_int8}
