"""What a run learns: a module to hold the parameters, and its loss as (sum, count)."""

from typing import NamedTuple

from omnifusion_jax.data.synthetic import CELL_WORDS
from omnifusion_jax.models.omnifusion import OmniFusion
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.init import dense
from omnifusion_jax.training.loss import answer_loss, token_loss


class Objective(NamedTuple):
    module: type  # module(config.model, rngs=...)
    loss: object  # loss(module, batch, key, remat) -> (sum, count)


class PatchReader(nnx.Module):
    """A bare encoder and a linear map that names what stands where each patch lies."""

    def __init__(self, c, *, rngs):
        self.encoders = nnx.List([VisionTransformer(c.encoder, rngs=rngs)])
        self.head = dense(rngs, c.encoder.embed, len(CELL_WORDS), fan_in=c.encoder.embed)

    def __call__(self, images):
        """uint8[batch, size, size, 3] to logits [batch, patches, words].

        One head reads the layer that adapters read and the last one, so that no block of the encoder stays untaught.
        """
        encoder = self.encoders[0]
        states = encoder.hidden_states(images)
        return encoder.features(states[encoder.config.feature_layer] + states[-1]) @ self.head[...]


def answers(model, batch, key, remat):
    return answer_loss(model.decoder, model.hidden(batch, key, remat), batch)


def patches(model, batch, key, remat):
    return token_loss(model(batch.images[0][:, 0]), batch.tokens, batch.weights)


OBJECTIVES = {"answers": Objective(OmniFusion, answers), "patches": Objective(PatchReader, patches)}
