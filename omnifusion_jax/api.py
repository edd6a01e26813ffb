"""`load`, which makes a model from a name or a directory, and `evaluate`, which measures its answers."""

import jax

from omnifusion_jax.checkpoints.base import scaled_factors
from omnifusion_jax.checkpoints.joined import joined
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.storage.placement import for_answers
from omnifusion_jax.config import one_of
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.evaluation.exact_match import exact_match
from omnifusion_jax.inference.model import Model
from omnifusion_jax.kept_programs import keep_programs


def load(
    source,
    *,
    vision=None,
    base=None,
    dtype: str | None = None,
    weights: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Model:
    """Loads a model that is ready to answer. What it compiles is kept on the disk, see `keep_programs`.

    Args:
      source: "omnifusion-tiny" (bundled), a native directory, one laid out like the OmniFusion release, a
        LLaVA of transformers, or a hub id.
      vision: the vision tower (directory, file or hub id), if the source does not hold one.
      base: the whole model, named like `source`, that has what a source of trained parts lacks. Factors of
        LoRA are merged into it, and stay beside kernels of integers.
      dtype: of parameters and computation, "float32" or "bfloat16"; None: float32 on CPUs, which are slow at
        anything else, and bfloat16 elsewhere.
      weights: what kernels of the decoder's layers are kept in: "int8", as the embeddings and the head then,
        "int4" (docs/weights.md), or "plain", `dtype`. None: as the source has them.
      mesh: from `sharding.make_mesh`; parameters are spread over it as they are read, and requests as they
        are answered. None: one device.
    Raises:
      CheckpointError: the source is unknown, unsafe or incomplete.
      ConfigError: `dtype` or `weights` is none of these, or `base` is another model than the source belongs
        to.
      DataError: the tokenizer is damaged or does not belong to the model.
    """
    keep_programs()
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    one_of("dtype", dtype, ("float32", "bfloat16"))
    found = load_checkpoint(source, vision=vision, dtype=dtype, base=base, weights=weights)
    if found.missing:
        raise CheckpointError(
            f"{source} holds only {', '.join(found.parts)}; "
            f"{', '.join(found.missing)} of the model are missing. A run saves what it trained: "
            "give the model that has the rest as base, go on from it with --config.init_from, "
            "or set checkpoint.final=complete to save a whole model"
        )
    if found.tokenizer is None:
        raise CheckpointError(
            f"{source} has no tokenizer: put tokenizer.json and tokenizer_config.json there"
        )
    tokenizer = Tokenizer(found.tokenizer).for_vocabulary(found.config.decoder.vocab)
    arrays = for_answers(joined(found.config, scaled_factors(found)), mesh)
    return Model(found.config, arrays, tokenizer, dtype=dtype, name=str(source))


def evaluate(model, path, images="", *, count=0, batch_size=64, max_new_tokens=32, blind=False):
    """Asks a model the questions of a data set.

    Args:
      model: a Model, or what `load` takes.
      path, images: the data set, as `data.path` and `data.images` of a config name it.
      count: how many of its questions are asked; 0: all of a finite set.
      blind: ask about blank pictures too, which gives "blind_accuracy".
    Returns: ({"accuracy": share answered exactly, "questions": their number, ...}, [exact_match.Record]).
    Raises: DataError, and what `load` raises.
    """
    model = model if isinstance(model, Model) else load(model)
    source = open_source(path, images, model.config.image.encoders[0].side)
    return exact_match(
        model, source, count, batch_size=batch_size, max_new_tokens=max_new_tokens, blind=blind
    )
