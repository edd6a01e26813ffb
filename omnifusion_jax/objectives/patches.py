"""The objective "patches": a bare encoder learns to name what covers each patch of synthetic pictures.

The bundled encoder was made this way.
"""

import math

from omnifusion_jax.data.pictures import ImageProcessor
from omnifusion_jax.data.pipeline import Batches, PatchSource, keep
from omnifusion_jax.data.synthetic import CELL_WORDS
from omnifusion_jax.evaluation.patches import patch_accuracy
from omnifusion_jax.models.patch_reader import PatchReader
from omnifusion_jax.objectives.answers import common
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.loss import token_loss


class Patches:
    """See objectives.base.Objective."""

    rows, text, pairs, columns = 1, False, False, ()

    def of(self, config):
        return self

    def begin(self, config, tokenizer, arrays):
        pass

    def module(self, c, *, rngs):
        return PatchReader(c, len(CELL_WORDS), rngs=rngs)

    def loss(self, module, batch, key, remat):
        pictures = batch.media["image"][0]  # [pools, pictures, size, size, 3], one picture a row
        logits = module(pictures.reshape(-1, *pictures.shape[2:]))
        covered = batch.tokens > 0  # an empty patch costs nothing
        return token_loss(logits, batch.tokens, batch.weights, covered)

    def ignorance(self, config, tokenizer):
        return math.log(len(CELL_WORDS))

    def batches(self, config, tokenizer):
        image = config.model.image
        side, tile = image.encoders[0].side, ImageProcessor.of(image).tile(0)
        return Batches(PatchSource(side), keep, length=side * side, tiles={"image": tile}, **common(config))

    def evaluator(self, config, tokenizer):
        count = config.eval.count

        def evaluate(arrays):
            return patch_accuracy(config.model, arrays, count), []

        return evaluate if count else None


OBJECTIVES["patches"] = Patches()
