"""The assembly: encoder, adapter, special vectors, decoder; features go among the text by gather."""

import jax
import jax.numpy as jnp

from omnifusion_jax.batch import FEATURE, SPECIAL
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.models.adapters import TransformerAdapter
from omnifusion_jax.models.decoder import Decoder
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attention import AttentionSpec
from omnifusion_jax.nn.init import dense


class SpecialVectors(nnx.Module):
    """Four free token embeddings: before a user turn, before an answer, before and after an image."""

    def __init__(self, width, *, rngs):
        self.user = dense(rngs, width, fan_in=width)
        self.bot = dense(rngs, width, fan_in=width)
        self.soi = dense(rngs, width, fan_in=width)
        self.eoi = dense(rngs, width, fan_in=width)

    def __call__(self):  # [4, width], in the order of batch.py
        return jnp.stack([self.user[...], self.bot[...], self.soi[...], self.eoi[...]])


def insert(text, rows, index, here):
    """Puts `rows[b, index[b, t]]` where `here[b, t]`, and leaves the text elsewhere.

    text [batch, seq, embed], rows [batch, n, embed], index int32[batch, seq], here bool[batch, seq].
    """
    placed = jnp.take_along_axis(rows, jnp.where(here, index, 0)[..., None], axis=1)
    return jnp.where(here[..., None], placed, text)


class OmniFusion(nnx.Module):
    """Adapter-based multimodal language model.

    Parameters live under `encoders/0/`, `adapter/`, `special/` and `decoder/`; the freeze table, checkpoints and sharding rules speak of those paths.
    """

    def __init__(self, c: ModelConfig, *, rngs):
        self.encoders = nnx.List([VisionTransformer(c.encoder, rngs=rngs)])
        self.adapter = TransformerAdapter(c.adapter, c.encoder.embed, c.decoder.embed, rngs=rngs)
        self.special = SpecialVectors(c.decoder.embed, rngs=rngs)
        self.decoder = Decoder(c.decoder, rngs=rngs)

    def encode(self, images, key=None):
        """uint8[batch, images, size, size, 3] to token embeddings [batch, images * rows, embed]."""
        batch, count = images.shape[:2]
        if count == 0:
            return jnp.zeros((batch, 1, self.special.user.shape[-1]), self.special.user.dtype)
        features = self.adapter(self.encoders[0](images.reshape(-1, *images.shape[2:])), key)
        return features.reshape(batch, -1, features.shape[-1])

    def embed(self, batch, key=None):
        """Token embeddings [batch, seq, embed] of a laid-out `batch.Batch`, images included."""
        x = self.decoder.embed[...][batch.tokens].astype(self.decoder.head[...].dtype)
        x = insert(x, self.encode(batch.images, key), batch.index, batch.kind == FEATURE)
        special = jnp.broadcast_to(self.special(), (len(x), 4, x.shape[-1]))
        return insert(x, special, batch.index, batch.kind == SPECIAL)

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
