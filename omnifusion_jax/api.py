"""`load`: from a name or a directory to a model that answers."""

import jax.numpy as jnp

from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.config import one_of
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.model import Model


def load(source, *, vision=None, dtype="float32"):
    """A model ready to answer.

    Args:
      source: "omnifusion-tiny" (bundled), a native directory, a directory laid out like the OmniFusion release, or a hub id.
      vision: the Hugging Face CLIP directory or hub id, where the source does not hold one.
      dtype: of parameters and computation, "float32" or "bfloat16".
    Raises CheckpointError when the source is unknown, unsafe or incomplete.
    """
    one_of("dtype", dtype, ("float32", "bfloat16"))
    found = load_checkpoint(source, vision=vision)
    return Model(found.config, found.arrays, Tokenizer(found.tokenizer), dtype=jnp.dtype(dtype))
