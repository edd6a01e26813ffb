"""Reads checkpoints of every known format, and the parts that training starts from."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import jax

from omnifusion_jax.checkpoints import integers, native
from omnifusion_jax.checkpoints.base import WEIGHTS, completed, kept_as
from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_tokenizer
from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import vision_towers
from omnifusion_jax.checkpoints.llava.read import is_llava
from omnifusion_jax.checkpoints.llava.read import read as read_llava
from omnifusion_jax.checkpoints.omnifusion import original, phase1
from omnifusion_jax.checkpoints.omnilmm.read import is_omnilmm
from omnifusion_jax.checkpoints.omnilmm.read import read as read_omnilmm
from omnifusion_jax.checkpoints.storage import hub
from omnifusion_jax.checkpoints.storage.bundled import VISION, locate
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.placement import placed
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
from omnifusion_jax.config import (
    DecoderConfig,
    EncoderConfig,
    LoraConfig,
    ModelConfig,
    TrainConfig,
    check,
    one_of,
)
from omnifusion_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Format:
    """A way of keeping a model in a directory."""

    knows: Callable[[Path], bool]  # whether a directory has this format; reads settings and names only
    # (directory, dtype, **options) to (config, arrays, tokenizer) as `Checkpoint` has them
    read: Callable[..., tuple[ModelConfig, dict[str, Lazy], Path | None]]
    known_by: str  # the files by which a directory is recognised
    options: tuple[str, ...] = ()  # the options of `load_checkpoint` that `read` takes


RELEASE = "tuned-model/, tokenizer/, projection.pt, special_embeddings.pt"
FORMATS = {  # the first format that knows a directory reads it
    "native": Format(native.is_native, native.read, "arrays/ and config.json"),
    "llava": Format(is_llava, read_llava, "config.json of type llava or llava_next"),
    "omnilmm": Format(is_omnilmm, read_omnilmm, "config.json of type omnilmm or minicpmv", ("vision",)),
    "omnifusion-phase1": Format(
        phase1.is_phase1, phase1.read, "projection.pt and special_embeddings.pt alone", ("preset", "assign")
    ),
    "omnifusion": Format(original.locate, original.read, RELEASE, ("vision", "assign")),
}
NO_TOKENIZER = (
    "no tokenizer: set parts_from.decoder, init_from or tokenizer (a directory with tokenizer.json)"
)
ALONE = {  # sources that are one part of a model: (how they are recognised, how convert takes them)
    "a vision tower": (vision_towers.is_encoder, "--vision={} --decoder=LANGUAGE_MODEL"),
    "a language model": (language_models.is_decoder, "--decoder={} --vision=VISION_TOWER"),
}


def load_checkpoint(
    source: str | Path,
    vision: str | Path | None = None,
    dtype=None,
    mesh: jax.sharding.Mesh | None = None,
    *,
    vision2: str | Path | None = None,
    assign: str | Path | None = None,
    preset: str | None = None,
    format: str | None = None,
    base: str | Path | None = None,
    weights: str | None = None,
) -> Checkpoint:
    """Reads a checkpoint and recognises its format.

    Args:
      source: directory or hub id (org/name, org/name:folder) of a native checkpoint (which may hold only some
        parts of a model), a LLaVA of transformers, an original OmniFusion model, or what phase 1 of the
        original code writes.
      vision: vision tower as `load_encoder` takes it, for original directories that hold none; for OmniLMM's
        as timm has it, which may be one file of weights.
      vision2: the second vision tower, for the two-encoder model.
      assign: JSON file that says which tensor of the two-encoder adapter is which, see
        checkpoints/omnifusion/two_encoders.py. None works it out from the tensors.
      preset: the model for which phase 1 of the original code was run. None takes the model that
        omnifusion.json names, or the published one.
      format: a name in FORMATS; a source of any other format is refused. None takes every format.
      base: a whole model, as `source`, that has what a source of trained parts lacks. Factors in the source
        are merged into its kernels, if these are not kept as integers.
      weights: what kernels of the decoder's layers are kept in: "int8" (embeddings and head too) or "int4",
        made of the values that are stored; "plain", values. None leaves them as they are stored.
      dtype: "bfloat16", "float32" or a numpy type of the arrays but integers and their scales. None keeps the
        stored types.
      mesh: devices over which the arrays are spread as they are read; no process reads or holds more than the
        share of its own devices. None reads values only where they decide what the
        model is, such as whether a stored head equals the embedding.

    Raises:
      CheckpointError: the source is missing, of no known format, unsafe or incomplete, or its tokenizer does
        not fit its decoder.
      ConfigError: `base` is another model than the one that the source belongs to, or kernels cannot be kept
        as `weights` says.
    """
    if weights is not None:
        one_of("weights", weights, WEIGHTS)
    directory = hub.local(source, files=True)
    towers = [hub.local(tower, files=True) for tower in (vision or VISION.get(source), vision2) if tower]
    options = {"vision": towers, "assign": assign, "preset": preset}
    options = {option: value for option, value in options.items() if value}
    name = recognised(source, directory, format, options)
    stored = dtype if weights in (None, "plain") else None  # integers are made of the values as stored
    config, arrays, tokenizer = FORMATS[name].read(directory, stored, **options)
    factors = native.read_factors(directory) if name == "native" else None
    checkpoint = Checkpoint(config, arrays, tokenizer, name, factors)
    if base:
        checkpoint = completed(checkpoint, load_checkpoint(base, dtype=stored), base)
    checkpoint = kept_as(weights, checkpoint)
    checkpoint = dataclasses.replace(checkpoint, arrays=integers.typed(checkpoint.arrays, dtype))
    if mesh:
        checkpoint = dataclasses.replace(checkpoint, arrays=placed(mesh, checkpoint.arrays))
    if checkpoint.tokenizer is not None:
        check_tokenizer(checkpoint.tokenizer, checkpoint.config.decoder, source)
    return checkpoint


def recognised(source, directory: Path, wanted: str | None, options: Iterable[str]) -> str:
    """The name in FORMATS of a source's format. Raises CheckpointError as `load_checkpoint` does.

    Args:
      wanted: the only format that is not refused; None: any.
      options: those of `load_checkpoint` that the format has to take.
    """
    name = format_of(directory)
    if name is None:
        raise CheckpointError(f"{source}: {what_else(source, directory)}")
    if wanted not in (None, name):
        raise CheckpointError(
            f"{source}: of the format {name}, not {wanted}, which has {FORMATS[wanted].known_by}. "
            "Leave out format (--format)"
        )
    if unused := [option for option in options if option not in FORMATS[name].options]:
        said, flags = " and ".join(unused), ", --".join(unused)
        raise CheckpointError(
            f"{source}: the format {name} says itself what {said} would; leave out --{flags}"
        )
    return name


def format_of(directory: Path) -> str | None:
    """The name in FORMATS of a directory's format; None for a file, or if no format knows the directory."""
    if not directory.is_dir():
        return None
    return next((name for name, format in FORMATS.items() if format.knows(directory)), None)


def what_else(source, path: Path) -> str:
    """Says what a source is if it is not a checkpoint; the end of an error message."""
    for what, (test, how) in ALONE.items():
        if test(path):
            return (
                f"{what} alone, not a whole model. To put one together: "
                f"python -m omnifusion_jax.convert {how.format(source)} --output=DIR. "
                "Training takes the parts as --config.parts_from.image/encoders/0 and "
                "--config.parts_from.decoder"
            )
    if not path.is_dir():
        return "not a directory, and not a vision tower's file either"
    if native.is_native(path / "model"):
        return f"the folder of a training run; its model is {Path(source) / 'model'}"
    if (path / "checkpoints").is_dir():
        return "the folder of a training run that has not ended; its model will be in model/"
    known = "; ".join(f"{name}: {format.known_by}" for name, format in FORMATS.items())
    return f"a checkpoint of no known format ({known})"


def load_trained(source: str | Path, model: ModelConfig) -> tuple[ModelConfig, dict[str, Lazy], Path | None]:
    """What training continues from: (the config it was made with, {path: Lazy}, tokenizer directory or None).

    Kernels of integers come as values.

    Args:
      source: a native directory of a whole model or of the parts that phase 1 trained; or what phase 1 of the
        original code writes, which says little about the model that it belongs to.
      model: the config of the model to be trained, which supplies what the source does not say.

    Raises:
      CheckpointError: the source is neither, or belongs to a model of other sizes.
    """
    directory = hub.local(source)
    if phase1.is_phase1(directory):
        advice = "Train the model that they were made for: --config.model.preset=NAME"
        return *phase1.read_for(model, directory, advice), None
    if native.is_native(directory):
        config, arrays, tokenizer = native.read(directory)
        return config, integers.plain(arrays), tokenizer
    if format_of(directory) is None:
        raise CheckpointError(f"{source}: {what_else(source, directory)}")
    raise CheckpointError(
        f"{source}: training goes on from a native checkpoint (config.json and arrays/), "
        "or from projection.pt and special_embeddings.pt of the original's phase 1. "
        f"Convert this format first: python -m omnifusion_jax.convert --source={source} --output=DIR"
    )


def load_factors(source: str | Path) -> LoraConfig | None:
    """What the factors are in a source that `load_trained` takes; None when it has none."""
    directory = hub.local(source)
    return native.read_factors(directory) if native.is_native(directory) else None


def load_encoder(
    source: str | Path, path: str = "image/encoders/0", dtype=None
) -> tuple[EncoderConfig, dict[str, Lazy]]:
    """(config, {"PATH/...": Lazy}) of a vision tower, or of the first image encoder of a native directory.

    A vision tower is a directory, a file or a hub id of a family in `vision_towers.VISION_FAMILIES`.
    `path` is where the arrays belong in the model that takes them.

    Raises:
      CheckpointError: the source is neither, or is incomplete.
    """
    directory, first = hub.local(source, files=True), "image/encoders/0"
    if not native.is_native(directory):
        return vision_towers.read_encoder(directory, dtype, path)
    config, arrays = native_part(directory, first, dtype)
    return config.image.encoders[0], {name.replace(first, path, 1): a for name, a in arrays.items()}


def load_decoder(source: str | Path, dtype=None) -> tuple[DecoderConfig, dict[str, Lazy], Path | None]:
    """(config, {"decoder/...": Lazy}, tokenizer directory or None) of a language model.

    The source is a directory or hub id of a Hugging Face language model (of a family in
    `decoders.language_models`), or a native directory.

    Raises:
      CheckpointError: the source is neither, or is incomplete.
    """
    directory = hub.local(source)
    tokenizer = fast_tokenizer(directory)
    if not native.is_native(directory):
        return *language_models.read(directory, dtype), tokenizer
    config, arrays = native_part(directory, "decoder", dtype)
    return config.decoder, arrays, tokenizer


def load_tokenizer(config: TrainConfig) -> Path:
    """The tokenizer's directory of a run, found as run.starting_point finds it; no weight is read.

    Raises:
      CheckpointError: a source that should have one is missing.
      ConfigError: no source has one.
    """
    if config.tokenizer:
        return Path(locate(config.tokenizer))
    sources = (config.parts_from.get("decoder"), config.init_from)
    found = (fast_tokenizer(hub.local(source, weights=False)) for source in sources if source)
    directory = next(filter(None, found), None)
    check(directory is not None, NO_TOKENIZER)
    return directory


def native_part(directory: Path, part: str, dtype) -> tuple[ModelConfig, dict[str, Lazy]]:
    """The model's config, and the arrays of one of its parts by path."""
    config, arrays = native.open_native(directory, dtype)
    found = {path: a for path, a in arrays.items() if path.startswith(f"{part}/")}
    if not found:
        raise CheckpointError(
            f"{directory}: holds no {part}, only {', '.join(native.read_config(directory)[1])}"
        )
    return config, found
