"""How well a bare encoder names what stands where."""

import jax
import numpy as np

from omnifusion_jax.data.pipeline import PatchSource
from omnifusion_jax.data.synthetic import CELL_WORDS
from omnifusion_jax.models.patch_reader import PatchReader
from omnifusion_jax.nn import nnx


def patch_accuracy(model_config, arrays, count, batch_size=64):
    """Of the first `count` held-out pictures: {"accuracy": share of places that hold something and are named right, "pictures": count}."""
    reader = nnx.with_parameters(
        nnx.eval_shape(lambda: PatchReader(model_config, len(CELL_WORDS), rngs=nnx.Rngs(0))), arrays
    )
    source = PatchSource(model_config.image.encoders[0].side, "held-out")
    read = jax.jit(lambda reader, images: reader(images).argmax(-1))
    right = total = 0
    for start in range(0, count, batch_size):
        samples = [source[i] for i in range(start, min(count, start + batch_size))]
        labels = np.stack([sample.tokens for sample in samples])
        named = np.asarray(read(reader, np.concatenate([sample.media["image"][0] for sample in samples])))
        right, total = right + ((named == labels) & (labels > 0)).sum(), total + (labels > 0).sum()
    return {"accuracy": float(right / total), "pictures": count}
