"""What a conversion has to fill: the shape of every parameter of a model or of an encoder."""

from omnifusion_jax.config import EncoderConfig, ModelConfig
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx


def shapes_of(config: ModelConfig, *parts: str) -> dict[str, tuple]:
    """The shape of every parameter by path: of the whole model, or only of some of `config.parts`."""
    found, prefixes = nnx.parameters(abstract(config)), tuple(f"{part}/" for part in parts)
    return {path: a.shape for path, a in found.items() if not parts or path.startswith(prefixes)}


def encoder_shapes(config: EncoderConfig) -> dict[str, tuple]:
    """The shape of every parameter of an encoder, by its path within the encoder."""
    found = nnx.parameters(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))
    return {path: a.shape for path, a in found.items()}
