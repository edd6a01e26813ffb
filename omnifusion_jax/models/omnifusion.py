"""The assembly: encoders, adapter, special vectors, decoder; features go among the text by gather."""

import jax
import jax.numpy as jnp

from omnifusion_jax.batch import FEATURE, SPECIAL
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec
from omnifusion_jax.nn.init import dense
from omnifusion_jax.tables import ADAPTERS, DECODERS


class SpecialVectors(nnx.Module):
    """Free token embeddings by name: before a user turn, before an answer, before and after an image, at the end of a row of tiles' features."""

    def __init__(self, names, width, *, rngs):
        self.names = names
        for name in names:
            setattr(self, name, dense(rngs, width, fan_in=width))

    def __call__(self):  # [len(names), width]
        return jnp.stack([getattr(self, name)[...] for name in self.names])


def insert(text, rows, index, here):
    """Puts `rows[b, index[b, t]]` where `here[b, t]`, and leaves the text elsewhere.

    text [batch, seq, embed], rows [batch, n, embed], index int32[batch, seq], here bool[batch, seq].
    """
    placed = jnp.take_along_axis(rows, jnp.where(here, index, 0)[..., None], axis=1)
    return jnp.where(here[..., None], placed, text)


class OmniFusion(nnx.Module):
    """Adapter-based multimodal language model.

    Parameters live under `encoders/0/`, `encoders/1/`, `adapter/`, `special/` and `decoder/`; the freeze table, checkpoints and sharding rules speak
    of those paths.
    """

    def __init__(self, c: ModelConfig, *, rngs):
        self.views = tuple(c.views.index(c.view(encoder)) for encoder in c.encoders)
        self.encoders = nnx.List([VisionTransformer(encoder, rngs=rngs) for encoder in c.encoders])
        self.adapter = ADAPTERS[c.adapter.kind](c, rngs=rngs)
        self.special = SpecialVectors(c.special, c.decoder.embed, rngs=rngs) if c.special else None
        self.decoder = DECODERS[c.decoder.family](c.decoder, rngs=rngs)

    def encode(self, images, key=None):
        """Token embeddings [batch, tiles * rows, embed] of pictures: for each view uint8[batch, tiles, size, size, 3]."""
        flat = [images[view].reshape(-1, *images[view].shape[2:]) for view in self.views]
        rows = self.adapter(self.adapter.read(self.encoders, flat), key)
        return rows.reshape(len(images[0]), -1, rows.shape[-1])

    def embed(self, batch, key=None):
        """Token embeddings [batch, seq, embed] of a laid-out `batch.Batch`, images included."""
        x = self.decoder.embed_tokens(batch.tokens)
        if batch.images[0].shape[1]:
            x = insert(x, self.encode(batch.images, key), batch.index, batch.kind == FEATURE)
        if self.special is not None:
            special = self.special()
            x = insert(x, jnp.broadcast_to(special, (len(x), *special.shape)), batch.index, batch.kind == SPECIAL)
        return x

    def hidden(self, batch, key=None, remat="none"):
        """Hidden states [batch, seq, embed] after the last norm, without a cache. `key` turns the adapter's dropout on."""
        spec = AttentionSpec.of(batch.segments, batch.positions, self.decoder.config.window)
        return self.decoder(self.embed(batch, key), spec, remat=remat)[0]

    def __call__(self, batch):
        """Logits float32[batch, seq, vocab]."""
        return self.decoder.logits(self.hidden(batch))


def abstract(c: ModelConfig):
    """The model's shapes, no memory taken."""
    return nnx.eval_shape(lambda: OmniFusion(c, rngs=nnx.Rngs(0)))


def cast(arrays, dtype):
    """Every floating array of a tree in `dtype`."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, arrays)
