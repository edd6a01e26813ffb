"""How well a bare encoder names what covers each patch of a picture."""

import jax
import numpy as np

from omnifusion_jax import hosts
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.pipeline import PatchSource
from omnifusion_jax.data.synthetic import CELL_WORDS
from omnifusion_jax.models.patch_reader import PatchReader
from omnifusion_jax.nn import nnx


@jax.jit
def read(reader, pictures):
    """The index of the word for each patch: int32[pictures, patches]."""
    return reader(pictures).argmax(-1)


def patch_accuracy(model_config: ModelConfig, arrays: dict, count: int, batch_size: int = 64) -> dict:
    """Measures a PatchReader with the parameters `arrays` on the first `count` held-out pictures.

    Returns: {"accuracy": the share of non-empty patches that are named right, "pictures": count}.
    """
    skeleton = nnx.eval_shape(lambda: PatchReader(model_config, len(CELL_WORDS), rngs=nnx.Rngs(0)))
    reader = nnx.with_parameters(skeleton, arrays)
    source = PatchSource(model_config.image.encoders[0].side, "held-out")
    right = total = 0
    for start in range(0, count, batch_size):
        samples = [source[i] for i in range(start, min(count, start + batch_size))]
        labels = np.stack([sample.tokens for sample in samples])
        pictures = np.concatenate([sample.media["image"][0] for sample in samples])
        named = hosts.fetch(read(reader, pictures))
        right += ((named == labels) & (labels > 0)).sum()
        total += (labels > 0).sum()
    return {"accuracy": float(right / total), "pictures": count}
