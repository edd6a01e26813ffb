"""What an objective is."""

from typing import Protocol

from omnifusion_jax.config import ModelConfig, TrainConfig


class Objective(Protocol):
    """All that differs between runs that learn different things; the loop knows none of it.

    `tokenizer` is a data.tokenizer.Tokenizer, or None where the objective needs no text.
    """

    rows: int  # of a batch for each example; those of one example share a pool, and so stay together when portions are taken
    text: bool  # whether a tokenizer must be there

    def module(self, c: ModelConfig, *, rngs):
        """The module that holds the parameters, at the paths of `c.parts`; what it has besides is no part of a model."""

    def batches(self, config: TrainConfig, tokenizer):
        """An iterator as data.pipeline.Batches."""

    def loss(self, module, batch, key, remat):
        """(sum, count) over the targets of a batch: whoever accumulates divides once. `key` is for dropout."""

    def ignorance(self, config: TrainConfig, tokenizer) -> float:
        """The loss of a module that knows nothing."""

    def evaluator(self, config: TrainConfig, tokenizer):
        """A function from parameters by path to (figures by name, evaluation.exact_match.Records to show), or None."""
