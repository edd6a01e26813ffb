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
from omnifusion_jax.checkpoints.omnifusion import original, two_encoders
from omnifusion_jax.checkpoints.omnifusion.settings import ENCODERS, SETTINGS, settings
from omnifusion_jax.checkpoints.storage.lazy_array import lazy
from omnifusion_jax.checkpoints.storage.settings import write_json
from omnifusion_jax.checkpoints.storage.staging import written_beside
from omnifusion_jax.checkpoints.storage.weights import write_safetensors, write_weights
from omnifusion_jax.checkpoints.tokenizers import copy_tokenizer
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.tables import LAYOUTS

PUBLISHED = {
    ("clip", 336, 14, 1024, 24): "clip-vit-large-patch14-336"
}  # image size, patch, embed, layers: the name the original code asks for

PHASE1 = (original.PATH, "special")  # the parts that it trains
ADAPTERS = {"transformer": original.adapter_table, "sum": two_encoders.table}  # names by kind


def export_original(checkpoint: Checkpoint, output, dtype=None, pickles=True):
    """Writes tokenizer/, tuned-model/, the encoder's directory, the adapter, the special vectors and omnifusion.json into the new directory `output`.

    Of what phase 1 trained, the adapter, the vectors and omnifusion.json are written: what the original's
    phase 1 leaves for its phase 2.

    Args:
      checkpoint: a whole model, or adapter and special vectors alone.
      output: takes its name only when everything is written.
      dtype: "bfloat16", "float32" or a numpy type; None keeps the arrays' own.
      pickles: write projection.pt and special_embeddings.pt, which the original code loads and which need PyTorch to make. False writes
        .safetensors of the same names, which only this library reads.

    Raises:
      CheckpointError: parts are missing, `output` exists, the disk is full, or PyTorch is needed and not installed.
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


def write_frozen(checkpoint, directory, names, dtype):
    """The tokenizer, the decoder, and the encoders under their `names`."""
    config = checkpoint.config
    copy_tokenizer(checkpoint.tokenizer, made(directory / original.TOKENIZER))
    ends, tensors = (
        Tokenizer(checkpoint.tokenizer).ends,
        part(checkpoint, "decoder", language_models.table(config.decoder), dtype),
    )
    write_decoder(made(directory / original.DECODER), config.decoder, tensors, ends)
    for i, (name, encoder) in enumerate(zip(names, config.image.encoders, strict=True)):
        arrays = arrays_of(checkpoint, f"image/encoders/{i}", dtype)
        write_encoder(made(directory / name), encoder, arrays, config.image.fit, f"image/encoders/{i}")


def write_trained(checkpoint, directory, dtype, torch):
    """The adapter and the special vectors: pickles where there is `torch`."""
    config = checkpoint.config
    adapter = part(checkpoint, original.PATH, ADAPTERS[config.image.adapter.kind](config), dtype)
    special = part(checkpoint, "special", original.SPECIAL_TABLE, dtype)
    if torch and config.image.adapter.kind == "transformer":
        with classes_of_the_original(torch) as VisualToGPTMapping:
            torch.save(
                VisualToGPTMapping(config, as_torch(torch, adapter)), directory / f"{original.ADAPTER}.pt"
            )
    else:  # the code of the two-encoder adapter was never published, so there is no class to pickle
        write_safetensors(directory / f"{original.ADAPTER}.safetensors", adapter)
    if torch:
        torch.save(as_torch(torch, special), directory / f"{original.SPECIAL}.pt")
    else:
        write_safetensors(directory / f"{original.SPECIAL}.safetensors", special)


def part(checkpoint, name, table, dtype):
    """Foreign tensors by name of one part of the model, each read when it is written."""
    return to_foreign(arrays_of(checkpoint, name, dtype), table)


def arrays_of(checkpoint, name, dtype):
    arrays = {path: lazy(a) for path, a in checkpoint.arrays.items() if path.startswith(f"{name}/")}
    return {path: a.astype(dtype or a.dtype) for path, a in arrays.items()}


def tower_names(config):
    """Directories of the vision towers, in order."""
    found = [tower_name(encoder) for encoder in config.image.encoders]
    return found if len(set(found)) == len(found) else [f"{name}-{n}" for n, name in enumerate(found, 1)]


def tower_name(c):
    family = written_as(c)
    return PUBLISHED.get((family, c.image_size, c.patch, c.width, c.layers), family)


def made(directory) -> Path:
    directory.mkdir()
    return directory


def write_decoder(directory, c, tensors, ends):
    """`ends`: Tokenizer.ends."""
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
    """torch tensors by name. torch takes no bfloat16 from numpy: its bits travel as int16."""

    def convert(a):
        a = np.array(a, order="C")
        return (
            torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
            if a.dtype == "bfloat16"
            else torch.from_numpy(a)
        )

    return {name: convert(a) for name, a in tensors.items()}


@contextlib.contextmanager
def classes_of_the_original(torch):
    """While the block runs there is a module `models` with the class that the original code's projection.pt names."""

    class VisualToGPTMapping(torch.nn.Module):
        def __init__(self, config, tensors):
            super().__init__()
            c, width, out = config.image.adapter, config.image.encoders[0].width, config.decoder.width
            with torch.device("meta"):
                self.transformer_layer = torch.nn.TransformerEncoderLayer(
                    width, c.heads, c.mlp, c.dropout, layer_norm_eps=c.eps, batch_first=True
                )
                self.linear = torch.nn.Linear(width, out)
            self.n_embeddings, self.embedding_dim = (
                config.image.encoders[0].rows,
                out,
            )  # the original forward pass reads them
            self.load_state_dict(tensors, assign=True)
            self.eval()  # that code never turns its dropout off

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
