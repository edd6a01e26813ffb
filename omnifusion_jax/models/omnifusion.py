"""The whole model: streams of encoders and adapters, special vectors, and a decoder.

One gather puts the feature rows among the text.
"""

import jax
import jax.numpy as jnp

from omnifusion_jax.batch import FEATURE, SPECIAL, Batch
from omnifusion_jax.config import ModelConfig, StreamConfig
from omnifusion_jax.models.made import Made
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec
from omnifusion_jax.nn.init import dense
from omnifusion_jax.sharding import constrain
from omnifusion_jax.tables import ADAPTERS, DECODERS, ENCODERS


class SpecialVectors(nnx.Module):
    """Trained token embeddings that belong to no token, by name.

    They stand before a user turn, before an answer, before and after an image, and at the end of each row of
    features of a tiled image.
    """

    def __init__(self, names: tuple[str, ...], width: int, *, rngs: nnx.Rngs):
        self.names = names
        for name in names:
            setattr(self, name, dense(rngs, width, fan_in=width))

    def __call__(self):  # [len(names), width]
        return jnp.stack([getattr(self, name)[...] for name in self.names])


class Stream(nnx.Module):
    """Encoders and the adapter that joins them."""

    def __init__(self, c: StreamConfig, width: int, *, rngs: nnx.Rngs):
        self.views = tuple(c.views.index(c.view(encoder)) for encoder in c.encoders)
        self.encoders = nnx.List([ENCODERS[encoder.kind](encoder, rngs=rngs) for encoder in c.encoders])
        self.adapter = ADAPTERS[c.adapter.kind](c, width, rngs=rngs)

    def __call__(self, media, key=None, remat="none"):
        """Token embeddings [pools, tiles * rows, width] of media.

        `media` holds one array for each view; of pictures it is uint8[pools, tiles, size, size, 3]. After
        `take_features` it holds one for each encoder, [pools, tiles, rows, width].
        """
        flat = [media[view].reshape(-1, *media[view].shape[2:]) for view in self.views]
        rows = self.adapter(self.adapter.read(self.encoders, flat, remat), key)
        return rows.reshape(len(media[0]), -1, rows.shape[-1])

    def take_features(self):
        """Leaves the encoders out: from now on media come as the features that each of them made."""
        self.encoders = nnx.List([Made(encoder.config) for encoder in self.encoders])
        self.views = tuple(range(len(self.encoders)))


class OmniFusion(nnx.Module):
    """A multimodal language model that joins encoders to a decoder by adapters.

    The paths of its parameters begin with those of `ModelConfig.parts`: `image/encoders/0`, `image/adapter`,
    `special`, `decoder`. The freeze table, checkpoints and sharding rules refer to these paths.
    """

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs):
        self.streams = tuple(c.streams)
        for name, stream in c.streams.items():
            setattr(self, name, Stream(stream, c.decoder.width, rngs=rngs))
        self.special = SpecialVectors(c.special, c.decoder.width, rngs=rngs) if c.special else None
        self.decoder = DECODERS[c.decoder.family](c.decoder, rngs=rngs)

    def embed(self, batch: Batch, key=None, remat="none"):
        """Token embeddings [batch, seq, width] of a batch, media included; arguments as in `hidden`."""
        x = self.decoder.embed_tokens(batch.tokens)
        rows = []  # special vectors and feature rows, [pools, n, width] (pools: 1 for special vectors)
        first = jnp.zeros_like(batch.index)  # where the rows of a position's kind begin among all of them
        count = 0
        if self.special is not None:
            rows.append(self.special()[None])
            count = rows[0].shape[1]
        for number, name in enumerate(self.streams):
            media = batch.media[name]
            if media and media[0].shape[1]:  # without tiles the encoders do not run
                first = jnp.where(batch.kind == FEATURE + number, count, first)
                rows.append(getattr(self, name)(media, key, remat))
                count += rows[-1].shape[1]
        if not rows:
            return x
        pools = max(map(len, rows))
        rows = jnp.concatenate([jnp.broadcast_to(r, (pools, *r.shape[1:])) for r in rows], axis=1)
        return insert(x, rows, batch.index + first, batch.kind >= SPECIAL)

    def hidden(self, batch: Batch, key=None, remat="none"):
        """Hidden states [batch, seq, width] after the last norm, without a cache.

        `key` turns the adapter's dropout on; `remat` is a row of `nn.stack.REMAT`.
        """
        spec = AttentionSpec.of(batch.segments, batch.positions, self.decoder.config.window)
        return self.decoder(self.embed(batch, key, remat), spec, remat=remat)[0]

    def __call__(self, batch: Batch):
        """Logits float32[batch, seq, vocab]."""
        return self.decoder.logits(self.hidden(batch))


def insert(text, rows, index, here):
    """Puts rows into the text where `here` is true, with one gather.

    text [batch, seq, width], index int32[batch, seq], here bool[batch, seq], rows [pools, n, width]. One pool
    serves batch / pools consecutive rows of the text, and `index` counts within it.
    """
    index = jnp.where(here, index, 0).reshape(len(rows), -1, 1)
    placed = jnp.take_along_axis(rows, index, axis=1).reshape(text.shape)
    return constrain(jnp.where(here[..., None], placed, text), "batch", None, None)


def abstract(c: ModelConfig) -> OmniFusion:
    """The model with shapes in place of arrays, which takes no memory."""
    return nnx.eval_shape(lambda: OmniFusion(c, rngs=nnx.Rngs(0)))


def cast(arrays, dtype):
    """The tree with every floating-point array cast to `dtype`."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, arrays)
