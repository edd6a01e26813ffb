"""What an objective is."""

from collections.abc import Callable
from typing import Protocol, Self

from omnifusion_jax.config import ModelConfig, TrainConfig


class Objective(Protocol):
    """Everything that depends on what a run learns; the training loop knows nothing about it.

    `tokenizer` is a data.tokenizer.Tokenizer, or None when the objective needs no text.
    """

    # rows of a batch for each example; they share a pool, and so stay together in one micro-batch
    rows: int
    text: bool  # whether a tokenizer is needed
    pairs: bool  # whether its records are pairs of answers, which data.pairs lays out
    columns: tuple[str, ...]  # names of further columns that its batches have, Batch.extra

    def of(self, config: TrainConfig) -> Self:
        """The objective with the settings of a run, which its loss needs."""

    def begin(self, config: TrainConfig, tokenizer, arrays: Callable[[], dict]) -> None:
        """Makes what `batches` will read, unless it is there. All hosts call it together.

        Args:
          arrays: gives {path: parameter} that the run starts from, of the plain model, on its mesh. Those
            that are drawn are not among them.
        """

    def module(self, c: ModelConfig, *, rngs):
        """The module that holds the parameters of a model, at the paths of `c.parts`.

        It may hold others, which are not saved with the model.
        """

    def batches(self, config: TrainConfig, tokenizer):
        """An iterator like data.pipeline.Batches, whose batches hold `rows` rows for each example."""

    def loss(self, module, batch, key, remat):
        """The sum of the loss over the targets of a batch, and their count, by which the caller divides.

        A third value is {name: sum} of figures to log, which are divided by the same count.

        `key` is for dropout; `remat` says what a layer keeps for its backward pass
        (TrainConfig.remat).
        """

    def ignorance(self, config: TrainConfig, tokenizer) -> float:
        """The loss of a module that knows nothing."""

    def evaluator(self, config: TrainConfig, tokenizer):
        """A function from {path: parameter} to ({name: figure}, records to show), or None for no evaluation.

        The records are evaluation.exact_match.Records, the same questions each time. What is called here, and
        not the function, raises DataError when held-out data cannot be used: that is before the first step.
        """
