"""Checkpoints of every known format, and the parts that training starts from."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from omnifusion_jax.checkpoints import native
from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_tokenizer
from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import vision_towers
from omnifusion_jax.checkpoints.llava.read import is_llava
from omnifusion_jax.checkpoints.llava.read import read as read_llava
from omnifusion_jax.checkpoints.omnifusion import original, phase1
from omnifusion_jax.checkpoints.storage import hub
from omnifusion_jax.checkpoints.storage.bundled import VISION
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.placement import placed
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
from omnifusion_jax.config import DecoderConfig, EncoderConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Format:
    """A way in which models are kept in directories."""

    knows: Callable[[Path], bool]  # whether a directory is one; reads settings and names only
    read: Callable[
        ..., tuple[ModelConfig, dict[str, Lazy], Path | None]
    ]  # (directory, dtype, **options): as `Checkpoint` has them
    known_by: str  # files that make a directory one
    options: tuple[str, ...] = ()  # of `load_checkpoint`, that `read` takes


RELEASE = "tuned-model/, tokenizer/, projection.pt, special_embeddings.pt"
FORMATS = {  # the first that knows a directory reads it
    "native": Format(native.is_native, native.read, "arrays/ and config.json"),
    "llava": Format(is_llava, read_llava, "config.json of type llava or llava_next"),
    "omnifusion-phase1": Format(
        phase1.is_phase1, phase1.read, "projection.pt and special_embeddings.pt alone", ("preset", "assign")
    ),
    "omnifusion": Format(original.locate, original.read, RELEASE, ("vision", "assign")),
}
ALONE = {  # sources that are a part of a model: what they are, and how convert takes them
    "a vision tower": (vision_towers.is_encoder, "--vision={} --decoder=LANGUAGE_MODEL"),
    "a language model": (language_models.is_decoder, "--decoder={} --vision=VISION_TOWER"),
}


def load_checkpoint(
    source, vision=None, dtype=None, mesh=None, *, vision2=None, assign=None, preset=None, format=None
) -> Checkpoint:
    """Reads a checkpoint, recognising its format.

    Args:
      source: directory or hub id (org/name, org/name:folder): a native checkpoint (which may hold some parts
        only), a LLaVA of transformers, an original OmniFusion directory, or what its phase 1 writes.
      vision: vision tower as `load_encoder` takes it, for original directories that hold none.
      vision2: the second one, for the two-encoder model.
      assign: JSON file that tells the tensors of its adapter, see checkpoints/omnifusion/two_encoders.py; None: found out.
      preset: the model that the original's phase 1 was run for; None: the published one.
      format: a name in FORMATS, to read the source as that one or not at all; None: recognised.
      dtype: "bfloat16", "float32" or a numpy type of the arrays; None keeps what is stored.
      mesh: over which the arrays are spread as they are read: no process reads or holds more than its devices' share. None: nothing is read yet.

    Raises:
      CheckpointError: the source is not there, of no known format, unsafe, or incomplete, or its tokenizer is
        not of its decoder.
    """
    directory = hub.local(source, files=True)
    towers = [hub.local(tower, files=True) for tower in (vision or VISION.get(source), vision2) if tower]
    name = format_of(directory)
    if name is None:
        raise CheckpointError(f"{source}: {what_else(source, directory)}")
    if format not in (None, name):
        wanted = FORMATS[format].known_by
        raise CheckpointError(
            f"{source}: of the format {name}, not {format}, which has {wanted}. Leave out format (--format)"
        )
    options = {
        option: value
        for option, value in {"vision": towers, "assign": assign, "preset": preset}.items()
        if value
    }
    if unused := [option for option in options if option not in FORMATS[name].options]:
        said, flags = " and ".join(unused), ", --".join(unused)
        raise CheckpointError(
            f"{source}: the format {name} says itself what {said} would; leave out --{flags}"
        )
    config, arrays, tokenizer = FORMATS[name].read(directory, dtype, **options)
    checkpoint = Checkpoint(config, placed(mesh, arrays) if mesh else arrays, tokenizer, name)
    if checkpoint.tokenizer is not None:
        check_tokenizer(checkpoint.tokenizer, checkpoint.config.decoder, source)
    return checkpoint


def format_of(directory):
    """The name of a directory's format in FORMATS; None for no known one, and for a file."""
    if not directory.is_dir():
        return None
    return next((name for name, format in FORMATS.items() if format.knows(directory)), None)


def what_else(source, path):
    """What a source is that is no checkpoint."""
    for what, (test, how) in ALONE.items():
        if test(path):
            return (
                f"{what} alone, not a whole model. To put one together: python -m omnifusion_jax.convert {how.format(source)} --output=DIR. "
                "Training takes the parts as --config.parts_from.image/encoders/0 and --config.parts_from.decoder"
            )
    known = "; ".join(f"{name}: {format.known_by}" for name, format in FORMATS.items())
    return (
        f"a checkpoint of no known format ({known})"
        if path.is_dir()
        else "not a directory, and not a vision tower's file either"
    )


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
        return *phase1.read_for(
            model, directory, "Train the model that they were made for: --config.model.preset=NAME"
        ), None
    if not native.is_native(directory):
        raise CheckpointError(
            f"{source}: training goes on from a native checkpoint (config.json and arrays/), or from projection.pt and special_embeddings.pt of the "
            f"original's phase 1. Convert other formats first: python -m omnifusion_jax.convert --source={source} --output=DIR"
        )
    return native.read(directory)


def load_encoder(source, path="image/encoders/0", dtype=None) -> tuple[EncoderConfig, dict]:
    """(config, {"PATH/...": Lazy}) of a vision tower, or of a native directory's first encoder of pictures.

    A vision tower is a directory, a file, or a hub id, of a family in `vision_towers.VISION_FAMILIES`. Raises CheckpointError.
    """
    directory, first = hub.local(source, files=True), "image/encoders/0"
    if not native.is_native(directory):
        return vision_towers.read_encoder(directory, dtype, path)
    config, arrays = native_part(directory, first, dtype)
    return config.image.encoders[0], {name.replace(first, path, 1): a for name, a in arrays.items()}


def load_decoder(source, dtype=None) -> tuple[DecoderConfig, dict, Path | None]:
    """(config, {"decoder/...": Lazy}, tokenizer directory or None) of a Hugging Face Mistral or Llama directory or hub id, or of a native directory.

    Raises CheckpointError.
    """
    directory = hub.local(source)
    tokenizer = fast_tokenizer(directory)
    if not native.is_native(directory):
        return *language_models.read(directory, dtype), tokenizer
    config, arrays = native_part(directory, "decoder", dtype)
    return config.decoder, arrays, tokenizer


def native_part(directory, part, dtype):
    config, arrays = native.open_native(directory, dtype)
    found = {path: a for path, a in arrays.items() if path.startswith(f"{part}/")}
    if not found:
        raise CheckpointError(
            f"{directory}: holds no {part}, only {', '.join(native.read_config(directory)[1])}"
        )
    return config, found
