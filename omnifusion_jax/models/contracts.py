"""What a row of `tables.ENCODERS` and of `tables.DECODERS` offers; `adapters/base.py` says it of adapters."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from omnifusion_jax.config import DecoderConfig, EncoderConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec

Cache = list[tuple[jax.Array, jax.Array]]  # a (key, value) pair for each layer, in a form of `nn.kept`


class Encoder(Protocol):
    """A module that turns media into features.

    `media` is an array [batch, ...] of tiles, as the stream prepares them. Objectives that train a bare
    encoder ask for `hidden_states` too.
    """

    config: EncoderConfig

    @property
    def dtype(self):
        """The dtype of the computation."""

    def __init__(self, c: EncoderConfig, *, rngs: nnx.Rngs): ...

    def __call__(self, media: jax.Array, remat: str = "none") -> jax.Array:
        """Features [batch, rows, width] of the layer that the config names; `rows` is `c.rows`.

        `remat` says what is kept for the backward pass, a row of nn.stack.REMAT. An encoder that has no
        layers to speak of may leave it unread.
        """

    def features(self, state: jax.Array) -> jax.Array:
        """The feature rows of a hidden state, [batch, rows, width]."""

    def fold(self, media: jax.Array, each: Callable, start: Any, items: Any = None, skip=0, remat="none"):
        """Calls `acc, y = each(acc, state, items[i])` on every hidden state from number `skip` on, in order.

        Adapters that mix all layers read an encoder this way. Returns the last `acc`, and the ys stacked.
        """


class Decoder(Protocol):
    """A module that reads token embeddings.

    Its parameter `embed` [vocab, width] is the table of token embeddings, and `layers` a stack of blocks in a
    form of `nn.stack`: for inference it is unstacked into a list.
    """

    config: DecoderConfig
    layers: Any

    def __init__(self, c: DecoderConfig, *, rngs: nnx.Rngs): ...

    @property
    def dtype(self):
        """The dtype of the computation."""

    def embed_tokens(self, tokens: jax.Array) -> jax.Array:
        """Token ids int32[...] to their embeddings [..., width]."""

    def __call__(self, x, spec: AttentionSpec, cache: Cache | None = None, at=None, remat: str = "none"):
        """Embeddings [batch, seq, width] to hidden states of that shape, and the cache with the new entries.

        `at` int32[batch] is the index of the cache that each row's new keys and values are written from.
        `remat` says what is kept for the backward pass.
        """

    def init_cache(self, batch: int, length: int, dtype) -> Cache:
        """An empty cache for `length` positions."""

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., width] to scores float32[..., vocab]."""
