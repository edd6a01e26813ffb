"""Pictures of any shape as an encoder gets them: their patches in lines, and what tells lines apart."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp

from omnifusion_jax.batch import LINE_END
from omnifusion_jax.nn.attend import AttentionSpec, Places


class Grids(NamedTuple):
    """Where the patches of pictures belong, each in a grid of its own.

    A picture of 2 x 3 patches with room for 8 has

        there   1 1 1 1 1 1 0 0
        row     0 0 0 1 1 1 0 0
        column  0 1 2 0 1 2 0 0
    """

    there: jax.Array  # int32[batch, patches]: 1, or 0 where there is no patch
    row: jax.Array  # int32[batch, patches]
    column: jax.Array  # int32[batch, patches]
    height: jax.Array  # int32[batch, 1]: rows of the grid, 1 at least
    width: jax.Array  # int32[batch, 1]: columns of the grid, 1 at least

    @classmethod
    def of(cls, media) -> Self:
        """The grids of uint8[batch, patches, bytes], whose last byte is PATCH, LINE_END or 0."""
        marks = media[..., -1]
        there = (marks > 0).astype(jnp.int32)
        count = there.sum(axis=1, keepdims=True)
        height = jnp.maximum((marks == LINE_END).sum(axis=1, keepdims=True), 1)
        width = jnp.maximum(count // height, 1)
        index = jnp.arange(marks.shape[1])[None] * there  # a place outside of the grid has no position
        return cls(there, index // width, index % width, height, width)

    def seen_by(self, queries: int | None = None) -> AttentionSpec:
        """Attention to the patches that are there, of the patches themselves or of so many `queries`."""
        key = places(self.there)
        if queries is None:
            return AttentionSpec(key)
        return AttentionSpec(places(jnp.ones((len(self.there), queries), jnp.int32)), key)


def places(segments) -> Places:
    """Places of a sequence in which all that is of one segment sees each other."""
    zero = jnp.zeros_like(segments)
    return Places(segments, zero, zero)
