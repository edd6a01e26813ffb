"""A bare encoder with a head that reads its patches."""

from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import dense


class Tower(nnx.Module):
    """An encoder at its place in a model."""

    def __init__(self, c, *, rngs):
        self.encoders = nnx.List([VisionTransformer(c, rngs=rngs)])


class PatchReader(nnx.Module):
    """A bare encoder and a linear map that names what stands where each patch lies."""

    def __init__(self, c, words, *, rngs):
        self.image = Tower(c.image.encoders[0], rngs=rngs)
        self.head = dense(rngs, c.image.encoders[0].width, words, fan_in=c.image.encoders[0].width)

    def __call__(self, images):
        """uint8[batch, size, size, 3] to logits [batch, patches, words].

        One head reads the layer that adapters read and the last one, so that no block of the encoder stays untaught.
        """
        encoder = self.image.encoders[0]
        states = encoder.hidden_states(images)
        return encoder.features(states[encoder.config.feature_layer] + states[-1]) @ self.head[...]
