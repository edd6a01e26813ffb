"""Checkpoints of every known format, and the parts that training starts from."""

import dataclasses
from pathlib import Path
from typing import Any

from omnifusion_jax.checkpoints import encoders, hub, llama, llava, native, original
from omnifusion_jax.checkpoints.bundled import VISION
from omnifusion_jax.checkpoints.lazy import placed
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
from omnifusion_jax.config import DecoderConfig, EncoderConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError

PARTS = ("encoders", "adapter", "special", "decoder")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    config: ModelConfig
    arrays: dict[str, Any]  # by path: Lazy, which are read when they are used; jax arrays where a mesh was given
    tokenizer: Path | None  # directory with tokenizer.json
    family: str  # the format it was read from

    @property
    def parts(self):
        return tuple(part for part in PARTS if any(path.startswith(f"{part}/") for path in self.arrays))

    @property
    def missing(self):
        """Parts that the config's model has and that are not there."""
        return tuple(part for part in PARTS if part not in self.parts and (part != "special" or self.config.special))


def read_native(directory, dtype, mesh, vision=(), assign=None):
    complete(directory, vision, assign)
    read = native.load_native(directory, dtype, native.shardings(directory, mesh)) if mesh else native.open_native(directory, dtype)
    return *read, fast_tokenizer(directory)


def complete(directory, vision, assign):
    if vision or assign:
        raise CheckpointError(f"{directory}: this checkpoint has its own encoder and names; leave out vision and assign (--vision, --assign)")


def read_llava(directory, dtype, mesh, vision=(), assign=None):
    complete(directory, vision, assign)
    config, arrays, tokenizer = llava.read(directory, dtype)
    return config, placed(mesh, arrays) if mesh else arrays, tokenizer


def read_original(directory, dtype, mesh, vision=(), assign=None):
    config, arrays, tokenizer = original.read(directory, vision, dtype, assign)
    return config, placed(mesh, arrays) if mesh else arrays, tokenizer


# name: (whether a directory is of that family, reader to (config, arrays, tokenizer), what makes it one)
FAMILIES = {
    "native": (native.is_native, read_native, "arrays/ and config.json"),
    "llava": (llava.is_llava, read_llava, "config.json of type llava or llava_next"),
    "omnifusion": (original.locate, read_original, "tuned-model/, tokenizer/, projection.pt, special_embeddings.pt"),
}


def load_checkpoint(source, vision=None, dtype=None, mesh=None, *, vision2=None, assign=None, family=None) -> Checkpoint:
    """Reads a checkpoint, recognising its format.

    Args:
      source: directory or hub id: a native checkpoint (which may hold some parts only), a LLaVA of transformers, or an original OmniFusion
        directory.
      vision: vision tower as `load_encoder` takes it, for original directories that hold none.
      vision2: the second one, for the two-encoder model.
      assign: JSON file that tells the tensors of its adapter, see checkpoints/assign.py; None: found out.
      family: a name in FAMILIES, to read the source as that one or not at all; None: recognised.
      dtype: "bfloat16", "float32" or a numpy type of the arrays; None keeps what is stored.
      mesh: over which the arrays are spread as they are read: no process reads or holds more than its devices' share. None: nothing is read yet.

    Raises:
      CheckpointError: the source is not there, of no known format, unsafe, or incomplete.
    """
    directory = hub.local(source)
    towers = [hub.local(tower, files=True) for tower in (vision or VISION.get(source), vision2) if tower]
    found = next((name for name, (test, _, _) in FAMILIES.items() if test(directory)), None)
    if found is None:
        known = "; ".join(f"{name}: {files}" for name, (_, _, files) in FAMILIES.items())
        raise CheckpointError(f"{source}: a checkpoint of no known format ({known})")
    if family not in (None, found):
        raise CheckpointError(f"{source}: of the format {found}, not {family}, which has {FAMILIES[family][2]}. Leave out family (--family)")
    return Checkpoint(*FAMILIES[found][1](directory, dtype, mesh, towers, assign), found)


def load_encoder(source, number=0, dtype=None) -> tuple[EncoderConfig, dict]:
    """(config, {"encoders/NUMBER/...": Lazy}) of a vision tower, or of a native directory's first encoder.

    A vision tower is a directory, a file, or a hub id, of a family in `encoders.VISION_FAMILIES`. Raises CheckpointError.
    """
    directory, path = hub.local(source, files=True), f"encoders/{number}"
    if not native.is_native(directory):
        return encoders.read_encoder(directory, dtype, path)
    config, arrays = native_part(directory, "encoders", dtype)
    return config.encoder, {name.replace("encoders/0", path, 1): a for name, a in arrays.items() if name.startswith("encoders/0/")}


def load_decoder(source, dtype=None) -> tuple[DecoderConfig, dict, Path | None]:
    """(config, {"decoder/...": Lazy}, tokenizer directory or None) of a Hugging Face Mistral or Llama directory or hub id, or of a native directory.

    Raises CheckpointError.
    """
    directory = hub.local(source)
    tokenizer = fast_tokenizer(directory)
    if not native.is_native(directory):
        return *llama.read(directory, dtype), tokenizer
    config, arrays = native_part(directory, "decoder", dtype)
    return config.decoder, arrays, tokenizer


def native_part(directory, part, dtype):
    config, arrays = native.open_native(directory, dtype)
    found = {path: a for path, a in arrays.items() if path.startswith(f"{part}/")}
    if not found:
        raise CheckpointError(f"{directory}: holds no {part}, only {', '.join(native.read_config(directory)[1])}")
    return config, found
