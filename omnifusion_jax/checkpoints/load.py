"""Checkpoints of every known format, and the parts that training starts from."""

import dataclasses
from pathlib import Path
from typing import Any

from omnifusion_jax.checkpoints import decoders, encoders, hub, llava, native, original, phase1
from omnifusion_jax.checkpoints.bundled import VISION
from omnifusion_jax.checkpoints.lazy import placed
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
from omnifusion_jax.config import DecoderConfig, EncoderConfig, ModelConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import PRESETS


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    config: ModelConfig
    arrays: dict[str, Any]  # by path: Lazy, which are read when they are used; jax arrays where a mesh was given
    tokenizer: Path | None  # directory with tokenizer.json
    family: str  # the format it was read from

    @property
    def parts(self):
        return tuple(part for part in self.config.parts if any(path.startswith(f"{part}/") for path in self.arrays))

    @property
    def missing(self):
        """Parts that the config's model has and that are not there."""
        return tuple(part for part in self.config.parts if part not in self.parts)


def read_native(directory, dtype, mesh):
    read = native.load_native(directory, dtype, native.shardings(directory, mesh)) if mesh else native.open_native(directory, dtype)
    return *read, fast_tokenizer(directory)


def read_llava(directory, dtype, mesh):
    config, arrays, tokenizer = llava.read(directory, dtype)
    return config, placed(mesh, arrays) if mesh else arrays, tokenizer


def read_original(directory, dtype, mesh, vision=(), assign=None):
    config, arrays, tokenizer = original.read(directory, vision, dtype, assign)
    return config, placed(mesh, arrays) if mesh else arrays, tokenizer


def read_phase1(directory, dtype, mesh, preset=None, assign=None):
    advice = f"Say which model they were trained for: --preset=NAME (preset), one of {', '.join(PRESETS)}"
    config, arrays = phase1.read(directory, phase1.model_of(directory, preset), advice, dtype, assign)
    return config, placed(mesh, arrays) if mesh else arrays, None


# name: (test of a directory, reader to (config, arrays, tokenizer), what makes it one, options of the reader)
FAMILIES = {
    "native": (native.is_native, read_native, "arrays/ and config.json", ()),
    "llava": (llava.is_llava, read_llava, "config.json of type llava or llava_next", ()),
    "omnifusion-phase1": (phase1.is_phase1, read_phase1, "projection.pt and special_embeddings.pt alone", ("preset", "assign")),
    "omnifusion": (original.locate, read_original, "tuned-model/, tokenizer/, projection.pt, special_embeddings.pt", ("vision", "assign")),
}
ALONE = {  # sources that are a part of a model: what they are, and how convert takes them
    "a vision tower": (encoders.is_encoder, "--vision={} --decoder=LANGUAGE_MODEL"),
    "a language model": (decoders.is_decoder, "--decoder={} --vision=VISION_TOWER"),
}


def load_checkpoint(source, vision=None, dtype=None, mesh=None, *, vision2=None, assign=None, preset=None, family=None) -> Checkpoint:
    """Reads a checkpoint, recognising its format.

    Args:
      source: directory or hub id (org/name, org/name:folder): a native checkpoint (which may hold some parts
        only), a LLaVA of transformers, an original OmniFusion directory, or what its phase 1 writes.
      vision: vision tower as `load_encoder` takes it, for original directories that hold none.
      vision2: the second one, for the two-encoder model.
      assign: JSON file that tells the tensors of its adapter, see checkpoints/assign.py; None: found out.
      preset: the model that the original's phase 1 was run for; None: the published one.
      family: a name in FAMILIES, to read the source as that one or not at all; None: recognised.
      dtype: "bfloat16", "float32" or a numpy type of the arrays; None keeps what is stored.
      mesh: over which the arrays are spread as they are read: no process reads or holds more than its devices' share. None: nothing is read yet.

    Raises:
      CheckpointError: the source is not there, of no known format, unsafe, or incomplete, or its tokenizer is
        not of its decoder.
    """
    directory = hub.local(source, files=True)
    towers = [hub.local(tower, files=True) for tower in (vision or VISION.get(source), vision2) if tower]
    found = family_of(directory)
    if found is None:
        raise CheckpointError(f"{source}: {what_else(source, directory)}")
    _, reader, _, takes = FAMILIES[found]
    if family not in (None, found):
        raise CheckpointError(f"{source}: of the format {found}, not {family}, which has {FAMILIES[family][2]}. Leave out family (--family)")
    given = {name: value for name, value in {"vision": towers, "assign": assign, "preset": preset}.items() if value}
    if unused := [name for name in given if name not in takes]:
        raise CheckpointError(f"{source}: the format {found} says itself what {' and '.join(unused)} would; leave out --{', --'.join(unused)}")
    checkpoint = Checkpoint(*reader(directory, dtype, mesh, **given), found)
    if checkpoint.tokenizer is not None:
        check_tokenizer(checkpoint.tokenizer, checkpoint.config.decoder, source)
    return checkpoint


def family_of(directory):
    """The name of a directory's format in FAMILIES; None for no known one, and for a file."""
    return next((name for name, (test, *_) in FAMILIES.items() if test(directory)), None) if directory.is_dir() else None


def what_else(source, path):
    """What a source is that is no checkpoint."""
    for what, (test, how) in ALONE.items():
        if test(path):
            return (
                f"{what} alone, not a whole model. To put one together: python -m omnifusion_jax.convert {how.format(source)} --output=DIR. "
                "Training takes the parts as --config.parts_from.image/encoders/0 and --config.parts_from.decoder"
            )
    known = "; ".join(f"{name}: {files}" for name, (_, _, files, _) in FAMILIES.items())
    return f"a checkpoint of no known format ({known})" if path.is_dir() else "not a directory, and not a vision tower's file either"


def check_tokenizer(directory, decoder: DecoderConfig, source):
    """Raises CheckpointError where `directory` (None: there is none) has no tokenizer for `decoder`."""
    if directory is None:
        raise CheckpointError(
            f"{source}: no tokenizer for the language model. Put tokenizer.json and tokenizer_config.json, or tokenizer.model, there"
        )
    try:
        Tokenizer(directory).fits(decoder.vocab)
    except ValueError as error:  # DataError, and JSON that is none
        raise CheckpointError(f"{source}: its tokenizer cannot be used: {error}") from error


def load_trained(source, model: ModelConfig) -> tuple[ModelConfig, dict, Path | None]:
    """What training goes on from: (the config it was made with, {path: Lazy}, tokenizer directory or None).

    Args:
      source: a native directory, of a whole model or of what phase 1 trained; or what phase 1 of the original
        code writes, which says little of the model that it belongs to.
      model: the config of the model that is to be trained, which says what the source does not.

    Raises:
      CheckpointError: it is neither, or not of a model of these sizes.
    """
    directory = hub.local(source)
    if phase1.is_phase1(directory):
        return *phase1.read(directory, model, "Train the model that they were made for: --config.model.preset=NAME"), None
    if not native.is_native(directory):
        raise CheckpointError(
            f"{source}: training goes on from a native checkpoint (config.json and arrays/), or from projection.pt and special_embeddings.pt of the "
            f"original's phase 1. Convert other formats first: python -m omnifusion_jax.convert --source={source} --output=DIR"
        )
    return *native.open_native(directory), fast_tokenizer(directory)


def load_encoder(source, path="image/encoders/0", dtype=None) -> tuple[EncoderConfig, dict]:
    """(config, {"PATH/...": Lazy}) of a vision tower, or of a native directory's first encoder of pictures.

    A vision tower is a directory, a file, or a hub id, of a family in `encoders.VISION_FAMILIES`. Raises CheckpointError.
    """
    directory, first = hub.local(source, files=True), "image/encoders/0"
    if not native.is_native(directory):
        return encoders.read_encoder(directory, dtype, path)
    config, arrays = native_part(directory, first, dtype)
    return config.image.encoders[0], {name.replace(first, path, 1): a for name, a in arrays.items()}


def load_decoder(source, dtype=None) -> tuple[DecoderConfig, dict, Path | None]:
    """(config, {"decoder/...": Lazy}, tokenizer directory or None) of a Hugging Face Mistral or Llama directory or hub id, or of a native directory.

    Raises CheckpointError.
    """
    directory = hub.local(source)
    tokenizer = fast_tokenizer(directory)
    if not native.is_native(directory):
        return *decoders.read(directory, dtype), tokenizer
    config, arrays = native_part(directory, "decoder", dtype)
    return config.decoder, arrays, tokenizer


def native_part(directory, part, dtype):
    config, arrays = native.open_native(directory, dtype)
    found = {path: a for path, a in arrays.items() if path.startswith(f"{part}/")}
    if not found:
        raise CheckpointError(f"{directory}: holds no {part}, only {', '.join(native.read_config(directory)[1])}")
    return config, found
