"""The objective "preference": a model learns which of two answers is better, by DPO or dense DPO.

A pair is two segments of one row, and its picture is encoded once. Log-likelihoods under the reference, the
model that the run starts from, are computed once, before the first step.
"""

import math

from omnifusion_jax.config import PreferenceConfig, check
from omnifusion_jax.data.pairs import CHANGED
from omnifusion_jax.data.reading import open_reading
from omnifusion_jax.data.reference import REFERENCE, Numbered, PrepareReferred, Reference
from omnifusion_jax.evaluation import reference
from omnifusion_jax.objectives.answers import Answers
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.loss import log_likelihoods
from omnifusion_jax.training.pair_loss import pair_loss


class Preference(Answers):
    """See objectives.base.Objective."""

    pairs, columns = True, (CHANGED, REFERENCE)

    def __init__(self, c: PreferenceConfig | None = None):
        self.c = c

    def of(self, config):
        return Preference(config.preference)

    def loss(self, module, batch, key, remat):
        hidden = module.hidden(batch, key, remat)
        return pair_loss(log_likelihoods(module.decoder, hidden, batch, remat=remat), batch, self.c)

    def ignorance(self, config, tokenizer):
        """ln 2: both answers are equally good; with a term of SFT beside it, there is no such figure."""
        return math.inf if config.preference.sft else math.log(2)

    def expectation(self, config, tokenizer):
        beside = " beside the term of preference.sft" if config.preference.sft else ""
        return f"The loss begins at ln 2 = {math.log(2):.3f}{beside}: the model is still its reference."

    def begin(self, config, tokenizer, arrays):
        folder, data = reference.place(config), self.reading(config, tokenizer)
        reference.refer(config, tokenizer, data, arrays(), folder)

    def reading(self, config, tokenizer):
        check(
            config.data.packing,
            "objective=preference has both answers in one row: set data.packing=True, data.row_length to "
            "twice data.max_length, and data.window=1 for one pair a row",
        )
        return open_reading(config.data, config.model, tokenizer, pairs=True)

    def read_by(self, config, data):
        return Numbered(data.source), PrepareReferred(data.prepare, Reference(reference.place(config)))

    def evaluator(self, config, tokenizer):
        check(not config.eval.loss, "eval.loss is that of answers, and objective=preference has none of them")
        return super().evaluator(config, tokenizer)


OBJECTIVES["preference"] = Preference()
