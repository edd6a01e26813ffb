"""A model as it was read, whatever its format, and whether it is complete."""

import dataclasses
from pathlib import Path
from typing import Any

from omnifusion_jax.config import DecoderConfig, ModelConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    config: ModelConfig
    arrays: dict[
        str, Any
    ]  # by path: Lazy, which are read when they are used; jax arrays where a mesh was given
    tokenizer: Path | None  # directory with tokenizer.json
    format: str  # what it was read from: a name in FORMATS, or "parts"

    @property
    def parts(self):
        return tuple(
            part for part in self.config.parts if any(path.startswith(f"{part}/") for path in self.arrays)
        )

    @property
    def missing(self):
        """Parts that the config's model has and that are not there."""
        return tuple(part for part in self.config.parts if part not in self.parts)


def check_whole(checkpoint):
    """Raises CheckpointError for a checkpoint that lacks a part of its model, or a tokenizer."""
    if checkpoint.missing:
        raise CheckpointError(
            f"the checkpoint holds only {', '.join(checkpoint.parts)}; {', '.join(checkpoint.missing)} of the model are missing"
        )
    if checkpoint.tokenizer is None:
        raise CheckpointError("the checkpoint has no tokenizer")


def check_tokenizer(directory, decoder: DecoderConfig, source):
    """Raises CheckpointError where `directory` (None: there is none) has no tokenizer for `decoder`."""
    if directory is None:
        raise CheckpointError(
            f"{source}: no tokenizer for the language model. Put tokenizer.json and tokenizer_config.json, or tokenizer.model, there"
        )
    try:
        Tokenizer(directory).for_vocabulary(decoder.vocab)
    except ValueError as error:  # DataError, and JSON that is none
        raise CheckpointError(f"{source}: its tokenizer cannot be used: {error}") from error
