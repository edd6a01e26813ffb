"""A model as it was read from any format, and checks that it is complete."""

import dataclasses
from pathlib import Path
from typing import Any

from omnifusion_jax.config import DecoderConfig, LoraConfig, ModelConfig, part_of
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The config of a model, and those of its parts that a source holds."""

    config: ModelConfig
    arrays: dict[str, Any]  # by path: Lazy, read when they are used, or jax arrays where a mesh was given
    tokenizer: Path | None  # directory with tokenizer.json
    format: str  # what it was read from: a name in load.FORMATS, or "parts"
    factors: LoraConfig | None = None  # of the arrays that are factors beside kernels, if there are such

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts whose arrays are there, in the order of `config.parts`, and lora at the end."""
        there = set(map(part_of, self.arrays))
        return tuple(part for part in (*self.config.parts, "lora") if part in there)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the parts of the config's model whose arrays are not there."""
        return tuple(part for part in self.config.parts if part not in self.parts)


def check_whole(checkpoint: Checkpoint):
    """Raises CheckpointError if the checkpoint lacks a part of its model, or a tokenizer."""
    if checkpoint.missing:
        raise CheckpointError(
            f"the checkpoint holds only {', '.join(checkpoint.parts)}; "
            f"{', '.join(checkpoint.missing)} of the model are missing. A whole model that has them can be "
            "given as base (--base)"
        )
    if checkpoint.tokenizer is None:
        raise CheckpointError("the checkpoint has no tokenizer")


def check_tokenizer(directory: Path | None, decoder: DecoderConfig, source: str | Path):
    """Raises CheckpointError if `directory` is None, or has no tokenizer that fits `decoder`.

    `source` is what the error message names.
    """
    if directory is None:
        raise CheckpointError(
            f"{source}: no tokenizer for the language model. "
            "Put tokenizer.json and tokenizer_config.json, or tokenizer.model, there"
        )
    try:
        Tokenizer(directory).for_vocabulary(decoder.vocab)
    except ValueError as error:  # DataError, or a file that is not valid JSON
        raise CheckpointError(f"{source}: its tokenizer cannot be used: {error}") from error
