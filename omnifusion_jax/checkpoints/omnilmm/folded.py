"""A language model with multipliers as one without, for readers that know of none: MiniCPM as a plain Llama.

Multiplying is exact but for the rounding of each product: token embeddings by `embed_scale`, the last map of
attention and of the feed-forward part by `residual_scale`, the head by `logit_scale`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_whole
from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.mapping.tensors import to_foreign
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, lazy
from omnifusion_jax.checkpoints.storage.settings import write_json
from omnifusion_jax.checkpoints.storage.staging import written_beside
from omnifusion_jax.checkpoints.storage.weights import write_weights
from omnifusion_jax.checkpoints.tokenizers import copy_tokenizer
from omnifusion_jax.config import DecoderConfig, part_of
from omnifusion_jax.data.tokenizer import Tokenizer

FACTORS = {  # by path under decoder/: the multiplier that goes into it
    "embed": "embed_scale",
    "layers/attention/out/kernel": "residual_scale",
    "layers/feed_forward/down/kernel": "residual_scale",
    "head": "logit_scale",
}


def folded(c: DecoderConfig, arrays: Mapping[str, Lazy]) -> tuple[DecoderConfig, dict[str, Lazy]]:
    """A Llama that computes what `c` says, and its arrays by path; a tied head becomes one of its own."""
    found = dict(arrays)
    if c.tied and c.embed_scale != c.logit_scale:
        embed = arrays["decoder/embed"]
        found["decoder/head"] = Lazy(embed.shape[::-1], embed.dtype, lambda spans: embed.read(spans[::-1]).T)
    for name, field in FACTORS.items():
        path, factor = f"decoder/{name}", getattr(c, field)
        if path in found and factor != 1:
            found[path] = times(found[path], factor)
    plain = dict.fromkeys(("embed_scale", "residual_scale", "logit_scale"), 1.0)
    tied = c.tied and "decoder/head" not in found
    return dataclasses.replace(c, family="llama", tied=tied, **plain), found


def times(a: Lazy, factor: float) -> Lazy:
    """The array times a number, multiplied in float32."""

    def read(spans):
        return (a.read(spans).astype(np.float32) * np.float32(factor)).astype(a.dtype)

    return Lazy(a.shape, a.dtype, read, a.origin)


def export_llama(checkpoint: Checkpoint, output: str | Path, dtype=None):
    """Writes the language model of a checkpoint alone, as a new directory of `LlamaForCausalLM`.

    `dtype` is "bfloat16", "float32" or a numpy type; None keeps the arrays' own.

    Raises:
      CheckpointError: it has what no Llama has, parts are missing, or `output` exists.
    """
    check_whole(checkpoint)
    own = {path: lazy(a) for path, a in checkpoint.arrays.items() if part_of(path) == "decoder"}
    c, arrays = folded(checkpoint.config.decoder, own)
    arrays = {path: a.astype(dtype or a.dtype) for path, a in arrays.items()}
    with written_beside(output, sum(a.nbytes for a in arrays.values())) as partial:
        ends = Tokenizer(checkpoint.tokenizer).ends
        settings = language_models.decoder_json(c, str(arrays["decoder/embed"].dtype), ends)
        write_json(partial / "config.json", settings)
        write_weights(partial, to_foreign(arrays, language_models.table(c)))
        copy_tokenizer(checkpoint.tokenizer, partial)
