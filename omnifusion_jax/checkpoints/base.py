"""What training left of a model, and the model that it was trained on, as one."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from omnifusion_jax.checkpoints.checkpoint import Checkpoint
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.config import HANDED_ON, DecoderConfig, EncoderConfig, LoraConfig, part_of, same_settings
from omnifusion_jax.nn import quantized

# What a model chooses for itself, whatever its parts were made for
CHOSEN = {EncoderConfig: (*HANDED_ON, "image_size", "shortest_edge"), DecoderConfig: ("max_length",)}


def completed(found: Checkpoint, base: Checkpoint, source: str | Path) -> Checkpoint:
    """The checkpoint `found`, with the parts that it lacks from `base`, which was read from `source`.

    Factors are merged into the kernels beside them, a piece at a time, when these are read. If they were
    trained over kernels of integers, the values of such are what they are added to.

    Raises: ConfigError when a part that is taken has other settings.
    """
    theirs = base.config.parts
    for part in found.missing:
        ours = found.config.parts[part]
        if dataclasses.is_dataclass(ours):
            name = f"model.{part.replace('/', '.')}"
            same_settings(name, ours, theirs.get(part), source, but=CHOSEN.get(type(ours), ()))
    arrays = {path: a for path, a in base.arrays.items() if part_of(path) in found.missing}
    if found.factors is not None:
        arrays = {path: with_factors(path, a, found) for path, a in arrays.items()}
    arrays |= {path: a for path, a in found.arrays.items() if part_of(path) != "lora"}
    tokenizer = found.tokenizer or base.tokenizer
    return Checkpoint(found.config, arrays, tokenizer, found.format)


def with_factors(path: str, kernel: Lazy, found: Checkpoint) -> Lazy:
    """An array of the base, merged with the factors beside it, if there are any."""
    owner, _, name = path.rpartition("/")
    pair = [found.arrays.get(f"{owner}/{factor}") for factor in ("lora_a", "lora_b")]
    return kernel if name != "kernel" or None in pair else merged(kernel, *pair, found.factors)


def merged(kernel: Lazy, a: Lazy, b: Lazy, c: LoraConfig) -> Lazy:
    """kernel [layers, *ins, *outs] + alpha / rank * a [layers, *ins, rank] @ b [layers, rank, *outs]"""
    ins = a.ndim - 2
    rank = slice(0, c.rank)

    def read(spans):
        block = values(kernel, spans, ins, c.base).astype(np.float32)
        left = a.read((*spans[: 1 + ins], rank)).astype(np.float32)
        right = b.read((spans[0], rank, *spans[1 + ins :])).astype(np.float32)
        layers = len(left)
        added = left.reshape(layers, -1, c.rank) @ right.reshape(layers, c.rank, -1)
        return (block + c.alpha / c.rank * added.reshape(block.shape)).astype(kernel.dtype)

    return Lazy(kernel.shape, kernel.dtype, read, kernel.origin)


def values(kernel: Lazy, spans, ins: int, kind: str):
    """A piece of a kernel, as the integers of `kind` make it if it was kept as such."""
    if kind == "compute_dtype":
        return kernel.read(spans)
    # blocks are cut along the last dimension of the inputs, which is read whole
    wide = (*spans[:ins], slice(0, kernel.shape[ins]), *spans[ins + 1 :])
    block = jnp.asarray(kernel.read(wide))
    codes = quantized.quantise(block, quantized.scales_shape(block.shape, ins), kind)
    piece = (*(slice(None),) * ins, spans[ins])
    return np.asarray(quantized.values(*codes))[piece]
