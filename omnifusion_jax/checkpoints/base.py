"""What training left of a model, and the model that it was trained on, as one."""

import dataclasses
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints import integers
from omnifusion_jax.checkpoints.checkpoint import Checkpoint
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.config import (
    HANDED_ON,
    DecoderConfig,
    EncoderConfig,
    LoraConfig,
    check,
    part_of,
    same_settings,
)

WEIGHTS = ("plain", "int8", "int4")  # what the kernels of a decoder's layers are kept in; plain: values

# What a model chooses for itself, whatever its parts were made for
CHOSEN = {EncoderConfig: (*HANDED_ON, "image_size", "shortest_edge"), DecoderConfig: ("max_length",)}


def completed(found: Checkpoint, base: Checkpoint, source: str | Path) -> Checkpoint:
    """The checkpoint `found`, with the parts that it lacks from `base`, which was read from `source`.

    Raises: ConfigError when a part that is taken has other settings.
    """
    theirs = base.config.parts
    for part in found.missing:
        ours = found.config.parts[part]
        if dataclasses.is_dataclass(ours):
            name = f"model.{part.replace('/', '.')}"
            same_settings(name, ours, theirs.get(part), source, but=CHOSEN.get(type(ours), ()))
    taken = {path: a for path, a in base.arrays.items() if part_of(path) in found.missing}
    tokenizer = found.tokenizer or base.tokenizer
    return dataclasses.replace(found, arrays=taken | found.arrays, tokenizer=tokenizer)


def kept_as(weights: str | None, found: Checkpoint) -> Checkpoint:
    """The checkpoint with the kernels of its decoder's layers as values ("plain"), int8 or int4.

    None leaves them as they are stored. In int8 an output has one scale, and embeddings and head are integers
    too; in int4 64 inputs of an output have one.
    Factors are merged into values, and stay beside integers. If they were trained over integers, the values
    of such are what they are merged into.

    Raises: ConfigError when the kernels are not there, or cannot be kept so.
    """
    if "decoder" not in found.parts:
        check(weights is None, f"weights={weights}: the checkpoint holds no decoder, only {found.parts}")
        return found
    arrays, stored = found.arrays, integers.kind(found.arrays)
    if found.factors is not None and stored is None and found.factors.base != "compute_dtype":
        arrays = integers.quantised(found.config, arrays, found.factors.base)
    wanted = weights or stored or "plain"
    if wanted != "plain":
        if integers.kind(arrays) not in (None, wanted):
            arrays = integers.plain(arrays, np.float32)
        if integers.kind(arrays) is None:
            arrays = integers.quantised(found.config, arrays, wanted, whole=wanted == "int8")
        return dataclasses.replace(found, arrays=arrays)
    types = {path: a.dtype for path, a in integers.plain(found.arrays).items()}
    values = integers.plain(arrays, np.float32).items()
    merged = {path: with_factors(path, a, found) for path, a in values if part_of(path) != "lora"}
    arrays = {path: a.astype(types[path]) for path, a in merged.items()}
    return dataclasses.replace(found, arrays=arrays, factors=None)


def with_factors(path: str, kernel: Lazy, found: Checkpoint) -> Lazy:
    """A parameter, merged with the factors beside it, if there are any."""
    owner, _, name = path.rpartition("/")
    pair = [found.arrays.get(f"{owner}/{factor}") for factor in ("lora_a", "lora_b")]
    return kernel if name != "kernel" or None in pair else added(kernel, *pair, found.factors)


def added(kernel: Lazy, a: Lazy, b: Lazy, c: LoraConfig) -> Lazy:
    """kernel [layers, *ins, *outs] + alpha / rank * a [layers, *ins, rank] @ b [layers, rank, *outs]"""
    ins = a.ndim - 2
    rank = slice(0, c.rank)

    def read(spans):
        block = kernel.read(spans).astype(np.float32)
        left = a.read((*spans[: 1 + ins], rank)).astype(np.float32)
        right = b.read((spans[0], rank, *spans[1 + ins :])).astype(np.float32)
        layers = len(left)
        product = left.reshape(layers, -1, c.rank) @ right.reshape(layers, c.rank, -1)
        return block + c.alpha / c.rank * product.reshape(block.shape)

    return Lazy(kernel.shape, np.float32, read, kernel.origin)


def scaled_factors(found: Checkpoint) -> dict[str, Lazy]:
    """The parameters, with factors multiplied by alpha / rank."""
    if found.factors is None:
        return found.arrays
    scale = found.factors.alpha / found.factors.rank
    times = lambda b: Lazy(
        b.shape, np.float32, lambda spans: b.read(spans).astype(np.float32) * scale, b.origin
    )
    return {path: times(a) if path.endswith("/lora_b") else a for path, a in found.arrays.items()}
