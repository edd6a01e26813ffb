"""Writes a model under the names that OmniLMM-12B and MiniCPM-V have in public."""

from pathlib import Path

from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_whole
from omnifusion_jax.checkpoints.mapping.tensors import to_foreign
from omnifusion_jax.checkpoints.omnilmm.settings import config_json, model_config
from omnifusion_jax.checkpoints.omnilmm.systems import SYSTEMS, System, positions, table
from omnifusion_jax.checkpoints.storage.lazy_array import lazy
from omnifusion_jax.checkpoints.storage.settings import write_json
from omnifusion_jax.checkpoints.storage.staging import written_beside
from omnifusion_jax.checkpoints.storage.weights import write_weights
from omnifusion_jax.checkpoints.tokenizers import copy_tokenizer
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.fields import differences
from omnifusion_jax.models.adapters.resampler import square


def export_omnilmm(checkpoint: Checkpoint, output: str | Path, dtype=None):
    """Writes a new directory with weights, config.json and the tokenizer under the public names.

    The code that loads a MiniCPM-V elsewhere (`modeling_minicpmv.py` and its neighbours) is not written.

    Args:
      checkpoint: a whole model that is like OmniLMM-12B, or like MiniCPM-V 1.0 or 2.0, of any size.
      output: the new directory, which gets its name only once everything is written.
      dtype: "bfloat16", "float32" or a numpy type; None keeps the arrays' own.

    Raises:
      CheckpointError: the original would compute something else (all differences are listed), parts are
        missing, or `output` exists.
    """
    check_whole(checkpoint)
    c, ends = checkpoint.config, Tokenizer(checkpoint.tokenizer).ends
    system = system_of(c)
    arrays = {path: lazy(a).astype(dtype or a.dtype) for path, a in checkpoint.arrays.items()}
    tensors = to_foreign(arrays, table(c, system))
    fixed = square(c.image.side, c.decoder.width).astype(arrays["image/adapter/queries"].dtype)
    tensors = dict(tensors) | {positions(system): fixed}
    settings = config_json(c, system, str(arrays["decoder/embed"].dtype), ends)
    found = differences(c, model_config(settings, tensors, "config.json"))
    lost = [
        f"model.{path} would be {theirs!r:.60}"
        for path, (_, theirs) in sorted(found.items())
        if path not in ("preset", "filled_from")
    ]
    if lost:
        raise CheckpointError(f"no export to the format of {system.architecture}: {'; '.join(lost)}")
    with written_beside(output, sum(a.nbytes for a in tensors.values())) as partial:
        write_json(partial / "config.json", settings)
        write_weights(partial, tensors)
        copy_tokenizer(checkpoint.tokenizer, partial)


def system_of(c: ModelConfig) -> System:
    """The system that a model is like, by its language model.

    Raises:
      CheckpointError: there is none.
    """
    found = next((system for system in SYSTEMS.values() if system.family == c.decoder.family), None)
    if found is None or c.image.adapter.kind != "resampler" or len(c.image.encoders) != 1:
        raise CheckpointError(
            "no export to the formats of OmniLMM and MiniCPM-V: they have one encoder, a resampler and "
            f"{' or '.join(system.family for system in SYSTEMS.values())}; this model has "
            f"{len(c.image.encoders)}, adapter.kind {c.image.adapter.kind!r} and {c.decoder.family}"
        )
    return found
