"""Writes a model as the original OmniFusion code loads it."""

import contextlib
import sys
import types
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_whole
from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders.vision_towers import write_encoder, written_as
from omnifusion_jax.checkpoints.mapping.tensors import to_foreign
from omnifusion_jax.checkpoints.omnifusion import original, tables, two_encoders
from omnifusion_jax.checkpoints.omnifusion.settings import ENCODERS, SETTINGS, settings
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy, lazy
from omnifusion_jax.checkpoints.storage.settings import write_json
from omnifusion_jax.checkpoints.storage.staging import written_beside
from omnifusion_jax.checkpoints.storage.weights import write_safetensors, write_weights
from omnifusion_jax.checkpoints.tokenizers import copy_tokenizer
from omnifusion_jax.config import DecoderConfig, EncoderConfig, ModelConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.tables import LAYOUTS

# (family, image size, patch, width, layers) of a vision tower: the name that the original code asks for
PUBLISHED = {("clip", 336, 14, 1024, 24): "clip-vit-large-patch14-336"}

PHASE1 = (original.PATH, "special")  # the parts that phase 1 trains
ADAPTERS = {"transformer": tables.adapter_table, "sum": two_encoders.table}  # adapter kind: conversion table


def export_original(checkpoint: Checkpoint, output: str | Path, dtype=None, pickles: bool = True):
    """Writes a new directory that the original OmniFusion code loads.

    It holds tokenizer/, tuned-model/, a directory for each vision tower, the adapter, the special vectors and
    omnifusion.json. Of a checkpoint of phase 1 only the last three are written, which is what phase 1 of the
    original code leaves for its phase 2.

    Args:
      checkpoint: a whole model, or the adapter and the special vectors alone.
      output: the new directory, which gets its name only once everything is written.
      dtype: "bfloat16", "float32" or a numpy type; None keeps the arrays' own.
      pickles: write projection.pt and special_embeddings.pt, which the original code loads and which need
        PyTorch to make. False writes .safetensors of the same names, which only this library reads.

    Raises:
      CheckpointError: parts are missing, the original code has no such adapter or vectors, `output` exists,
        the disk is full, or PyTorch is needed and not installed.
    """
    whole = checkpoint.parts != PHASE1
    if whole:
        check_whole(checkpoint)
    config = checkpoint.config
    if config.image.adapter.kind not in ADAPTERS or config.special != LAYOUTS["original"].vectors:
        raise CheckpointError(
            f"the original layout has adapters of the kinds {' and '.join(ADAPTERS)} and the vectors "
            f"{', '.join(LAYOUTS['original'].vectors)}, not the kind {config.image.adapter.kind} with "
            f"{', '.join(config.special) or 'none'}. Write --to=native, or --to=llava where that is possible"
        )
    torch = import_torch() if pickles else None
    names = tower_names(config) if whole else []
    size = sum(a.size * np.dtype(dtype or a.dtype).itemsize for a in checkpoint.arrays.values())
    with written_beside(output, size) as partial:
        if whole:
            write_frozen(checkpoint, partial, names, dtype)
        write_trained(checkpoint, partial, dtype, torch)
        write_json(partial / SETTINGS, settings(config) | ({ENCODERS: names} if whole else {}))


def write_frozen(checkpoint: Checkpoint, directory: Path, names: list[str], dtype):
    """Writes the tokenizer, the decoder, and the encoders under their `names`."""
    config = checkpoint.config
    copy_tokenizer(checkpoint.tokenizer, made(directory / original.TOKENIZER))
    ends = Tokenizer(checkpoint.tokenizer).ends
    tensors = part(checkpoint, "decoder", language_models.table(config.decoder), dtype)
    write_decoder(made(directory / original.DECODER), config.decoder, tensors, ends)
    for i, (name, encoder) in enumerate(zip(names, config.image.encoders, strict=True)):
        arrays = arrays_of(checkpoint, f"image/encoders/{i}", dtype)
        write_encoder(made(directory / name), encoder, arrays, config.image.fit, f"image/encoders/{i}")


def write_trained(checkpoint: Checkpoint, directory: Path, dtype, torch):
    """Writes the adapter and the special vectors: as pickles if `torch` is given, else as safetensors."""
    config = checkpoint.config
    adapter = part(checkpoint, original.PATH, ADAPTERS[config.image.adapter.kind](config), dtype)
    special = part(checkpoint, "special", tables.SPECIAL_TABLE, dtype)
    if torch and config.image.adapter.kind == "transformer":
        with classes_of_the_original(torch) as VisualToGPTMapping:
            module = VisualToGPTMapping(config, as_torch(torch, adapter))
            torch.save(module, directory / f"{original.ADAPTER}.pt")
    else:  # the code of the two-encoder adapter was never published, so there is no class to pickle
        write_safetensors(directory / f"{original.ADAPTER}.safetensors", adapter)
    if torch:
        torch.save(as_torch(torch, special), directory / f"{original.SPECIAL}.pt")
    else:
        write_safetensors(directory / f"{original.SPECIAL}.safetensors", special)


def part(checkpoint: Checkpoint, name: str, table, dtype) -> dict[str, Lazy]:
    """The tensors of one part of the model, by the names of `table`. Each is read when it is written."""
    return to_foreign(arrays_of(checkpoint, name, dtype), table)


def arrays_of(checkpoint: Checkpoint, name: str, dtype) -> dict[str, Lazy]:
    """The arrays of one part of the model, by our paths."""
    arrays = {path: lazy(a) for path, a in checkpoint.arrays.items() if path.startswith(f"{name}/")}
    return {path: a.astype(dtype or a.dtype) for path, a in arrays.items()}


def tower_names(config: ModelConfig) -> list[str]:
    """Names of the vision towers' directories, in order; numbered if two would be equal."""
    found = [tower_name(encoder) for encoder in config.image.encoders]
    if len(set(found)) == len(found):
        return found
    return [f"{name}-{n}" for n, name in enumerate(found, 1)]


def tower_name(c: EncoderConfig) -> str:
    family = written_as(c)
    return PUBLISHED.get((family, c.image_size, c.patch, c.width, c.layers), family)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def write_decoder(directory: Path, c: DecoderConfig, tensors: dict[str, Lazy], ends: dict):
    """Writes the decoder's settings and weights. `ends` is `Tokenizer.ends`."""
    write_json(directory / "config.json", language_models.decoder_json(c, type_of(tensors), ends))
    write_json(directory / "generation_config.json", {"_from_model_config": True, **ends})
    write_weights(directory, tensors)


def type_of(tensors):
    return str(next(iter(tensors.values())).dtype)


def import_torch():
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            "projection.pt is a pickled PyTorch module; to write it: pip install omnifusion-jax[export]"
        ) from error
    return torch


def as_torch(torch, tensors):
    """The tensors as torch tensors, by name."""

    def convert(a):
        a = np.array(a, order="C")
        if a.dtype == "bfloat16":  # torch does not take it from numpy, so its bits are passed as int16
            return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(a)

    return {name: convert(a) for name, a in tensors.items()}


@contextlib.contextmanager
def classes_of_the_original(torch):
    """Gives the class that the original code's projection.pt names, `models.VisualToGPTMapping`.

    The module `models` exists while the block runs.
    """

    class VisualToGPTMapping(torch.nn.Module):
        def __init__(self, config, tensors):
            super().__init__()
            c, width, out = config.image.adapter, config.image.encoders[0].width, config.decoder.width
            with torch.device("meta"):
                self.transformer_layer = torch.nn.TransformerEncoderLayer(
                    width, c.heads, c.mlp, c.dropout, layer_norm_eps=c.eps, batch_first=True
                )
                self.linear = torch.nn.Linear(width, out)
            # The original forward pass reads these two
            self.n_embeddings, self.embedding_dim = config.image.encoders[0].rows, out
            self.load_state_dict(tensors, assign=True)
            self.eval()  # the original code never turns its dropout off

    VisualToGPTMapping.__module__, VisualToGPTMapping.__qualname__ = "models", "VisualToGPTMapping"
    theirs = types.ModuleType("models")
    theirs.VisualToGPTMapping = VisualToGPTMapping
    before = sys.modules.get("models")
    sys.modules["models"] = theirs
    try:
        yield VisualToGPTMapping
    finally:
        if before is None:
            del sys.modules["models"]
        else:
            sys.modules["models"] = before
