"""A bare encoder with a head that classifies its patches."""

from omnifusion_jax.config import EncoderConfig, ModelConfig
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import dense


class Tower(nnx.Module):
    """An encoder under the path that it has in a whole model."""

    def __init__(self, c: EncoderConfig, *, rngs: nnx.Rngs):
        self.encoders = nnx.List([VisionTransformer(c, rngs=rngs)])


class PatchReader(nnx.Module):
    """A bare encoder and a linear map that predicts what is at the place of each patch."""

    def __init__(self, c: ModelConfig, words: int, *, rngs: nnx.Rngs):
        encoder = c.image.encoders[0]
        self.image = Tower(encoder, rngs=rngs)
        self.head = dense(rngs, encoder.width, words, fan_in=encoder.width)

    def __call__(self, images):
        """Maps uint8[batch, size, size, 3] to logits [batch, patches, words].

        The head reads the sum of the layer that adapters read and the last layer, so that every block of the
        encoder is trained.
        """
        encoder = self.image.encoders[0]
        states = encoder.hidden_states(images)
        return encoder.features(states[encoder.config.feature_layer] + states[-1]) @ self.head[...]
