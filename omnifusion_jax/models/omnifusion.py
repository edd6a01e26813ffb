"""The assembly: streams of encoders and adapters, special vectors, decoder; features go among the text by gather."""

import jax
import jax.numpy as jnp

from omnifusion_jax.batch import FEATURE, SPECIAL
from omnifusion_jax.config import ModelConfig, StreamConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec
from omnifusion_jax.nn.init import dense
from omnifusion_jax.sharding import constrain
from omnifusion_jax.tables import ADAPTERS, DECODERS, ENCODERS


class SpecialVectors(nnx.Module):
    """Free token embeddings by name: before a user turn, before an answer, before and after an image, at the end of a row of tiles' features."""

    def __init__(self, names, width, *, rngs):
        self.names = names
        for name in names:
            setattr(self, name, dense(rngs, width, fan_in=width))

    def __call__(self):  # [len(names), width]
        return jnp.stack([getattr(self, name)[...] for name in self.names])


class Stream(nnx.Module):
    """Encoders and the adapter that joins them."""

    def __init__(self, c: StreamConfig, width, *, rngs):
        self.views = tuple(c.views.index(c.view(encoder)) for encoder in c.encoders)
        self.encoders = nnx.List([ENCODERS[encoder.kind](encoder, rngs=rngs) for encoder in c.encoders])
        self.adapter = ADAPTERS[c.adapter.kind](c, width, rngs=rngs)

    def __call__(self, media, key=None):
        """Token embeddings [pools, tiles * rows, width] of media: for each view uint8[pools, tiles, size, size, 3]."""
        flat = [media[view].reshape(-1, *media[view].shape[2:]) for view in self.views]
        rows = self.adapter(self.adapter.read(self.encoders, flat), key)
        return rows.reshape(len(media[0]), -1, rows.shape[-1])


class OmniFusion(nnx.Module):
    """Adapter-based multimodal language model.

    Parameters live under the paths of `ModelConfig.parts`: `image/encoders/0`, `image/adapter`, `special`, `decoder`; the
    freeze table, checkpoints and sharding rules speak of those.
    """

    def __init__(self, c: ModelConfig, *, rngs):
        self.streams = tuple(c.streams)
        for name, stream in c.streams.items():
            setattr(self, name, Stream(stream, c.decoder.width, rngs=rngs))
        self.special = SpecialVectors(c.special, c.decoder.width, rngs=rngs) if c.special else None
        self.decoder = DECODERS[c.decoder.family](c.decoder, rngs=rngs)

    def embed(self, batch, key=None):
        """Token embeddings [batch, seq, width] of a laid-out `batch.Batch`, media included."""
        x = self.decoder.embed_tokens(batch.tokens)
        rows, first = (
            [],
            jnp.zeros_like(batch.index),
        )  # what may stand among the text, [pools, n, width], and where each kind begins
        count = 0
        if self.special is not None:
            rows.append(self.special()[None])
            count = rows[0].shape[1]
        for number, name in enumerate(self.streams):
            media = batch.media[name]
            if media and media[0].shape[1]:  # no encoder runs for nothing
                first = jnp.where(batch.kind == FEATURE + number, count, first)
                rows.append(getattr(self, name)(media, key))
                count += rows[-1].shape[1]
        if not rows:
            return x
        pools = max(map(len, rows))
        rows = jnp.concatenate([jnp.broadcast_to(r, (pools, *r.shape[1:])) for r in rows], axis=1)
        return insert(x, rows, batch.index + first, batch.kind >= SPECIAL)

    def hidden(self, batch, key=None, remat="none"):
        """Hidden states [batch, seq, width] after the last norm, without a cache. `key` turns the adapter's dropout on."""
        spec = AttentionSpec.of(batch.segments, batch.positions, self.decoder.config.window)
        return self.decoder(self.embed(batch, key), spec, remat=remat)[0]

    def __call__(self, batch):
        """Logits float32[batch, seq, vocab]."""
        return self.decoder.logits(self.hidden(batch))


def insert(text, rows, index, here):
    """Puts rows where `here` says, and leaves the text elsewhere: one gather.

    text [batch, seq, width], index int32[batch, seq], here bool[batch, seq]; rows [pools, n, width], of which each serves
    batch / pools rows of the text.
    """
    index = jnp.where(here, index, 0).reshape(len(rows), -1, 1)
    placed = jnp.take_along_axis(rows, index, axis=1).reshape(text.shape)
    return constrain(jnp.where(here[..., None], placed, text), "batch", None, None)


def abstract(c: ModelConfig):
    """The model's shapes, no memory taken."""
    return nnx.eval_shape(lambda: OmniFusion(c, rngs=nnx.Rngs(0)))


def cast(arrays, dtype):
    """Every floating array of a tree in `dtype`."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, arrays)
