"""What a conversion has to fill: the shape of every parameter of a model or of an encoder."""

from omnifusion_jax.config import EncoderConfig, LoraConfig, ModelConfig, part_of
from omnifusion_jax.models import lora
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx

NONE = LoraConfig()


def shapes_of(config: ModelConfig, *parts: str, factors: LoraConfig = NONE) -> dict[str, tuple]:
    """The shape of every parameter by path: of the whole model, or only of some of `config.parts`.

    The part "lora" has the `factors` that are beside the model's kernels.
    """
    found = nnx.parameters(lora.outline(config, factors))
    return {path: a.shape for path, a in found.items() if not parts or part_of(path) in parts}


def encoder_shapes(config: EncoderConfig) -> dict[str, tuple]:
    """The shape of every parameter of an encoder, by its path within the encoder."""
    found = nnx.parameters(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))
    return {path: a.shape for path, a in found.items()}
