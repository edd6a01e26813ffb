"""Reads OmniFusion's published files.

This is what only OmniFusion has: which file lies where, the adapter, and the special vectors.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import vision_towers
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.checkpoints.omnifusion.settings import SETTINGS, apply_settings, named_encoders
from omnifusion_jax.checkpoints.omnifusion.tables import LAYER, SPECIAL_TABLE, adapter_table
from omnifusion_jax.checkpoints.omnifusion.two_encoders import adapter_config, assigned, choose, divided
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.settings import read_json, require
from omnifusion_jax.checkpoints.storage.torch_files import read_torch_file, state_dict
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
from omnifusion_jax.config import ImageConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import preset

# What a source directory holds besides a vision tower, which may have any name
TOKENIZER, DECODER, ADAPTER, SPECIAL = "tokenizer", "tuned-model", "projection", "special_embeddings"
FIRST = "OmniMistral-model"  # the decoder's folder in release 1.0, beside the other files
RELEASES = {  # the decoder's folder: (the tokenizer's folder, presets of the models that were released so)
    DECODER: (TOKENIZER, ("omnifusion-1.1", "omnifusion-1.1-mix")),
    FIRST: ("OmniMistral-tokenizer", ("omnifusion-1.0",)),
}
SUFFIXES = (".safetensors", ".pt")  # of the files of adapter and vectors; in release 1.0 they have none
ADVICE = (
    "Pass vision (--vision), a directory, or openai/clip-vit-large-patch14-336; "
    "for the two-encoder model vision2 (--vision2) besides, facebook/dinov2-large."
)
ROWS = "n_embeddings"  # attribute of the pickled adapter: the number of feature rows of a picture
RELU = "torch.nn.functional.relu"

PATH = "image/adapter"  # the adapter's name among the parts of a model


def locate(directory: Path) -> tuple[Path, str] | None:
    """(the directory with the files, the name of the decoder's folder there); None if there is no release.

    The files lie in `directory` itself or in its only subfolder that has them. Subfolders of the two-encoder
    model do not count, because its code was never published; it must be given by its own directory.
    The files of release 1.0 lie beside the decoder's folder; giving that folder means the release.

    Raises:
      CheckpointError: several subfolders have a release.
    """
    found = [
        d
        for d in sorted(directory.iterdir())
        if d.is_dir() and holds(d, DECODER) and not d.name.endswith("encoders-mix")
    ]
    if holds(directory, DECODER):
        return directory, DECODER
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: several models here ({', '.join(d.name for d in found)}). "
            "Give the directory of one."
        )
    if found:
        return found[0], DECODER
    top = directory.parent if directory.name == FIRST else directory
    return (top, FIRST) if holds(top, FIRST) else None


def holds(directory, decoder):
    return (directory / decoder).is_dir() and any(directory.glob(f"{ADAPTER}*"))


def read(
    source: Path, dtype=None, vision=(), assign: str | Path | None = None
) -> tuple[ModelConfig, dict[str, Lazy], Path]:
    """(ModelConfig, {path: Lazy}, tokenizer directory) of an original directory.

    Args:
      source: the directory of a model, or the one above it as in the published repository.
      dtype: type of the arrays; None keeps the stored types.
      vision: directories or files of one or two vision towers. If empty, omnifusion.json names them, or they
        are looked for inside `source`.
      assign: JSON file that says what the tensors of a two-encoder adapter are, see
        checkpoints/omnifusion/two_encoders.py. None works it out from the tensors.

    Raises:
      CheckpointError: a file is missing, unsafe, or does not fit the others.
      two_encoders.Ambiguous: a two-encoder adapter can be read in several ways.
    """
    directory, folder = locate(source)
    words, presets = RELEASES[folder]
    tokenizer = fast_tokenizer(directory / words)
    if tokenizer is None:
        raise CheckpointError(f"{directory}/{words}: neither tokenizer.json nor tokenizer.model is there")
    adapter = AdapterFile(directory)
    # The decoder's folder of release 1.0 stands for the directory above it, which has the vision tower
    top = directory if source.parent == directory else source
    vision = vision or named_encoders(directory) or find_encoders(top, adapter.towers)
    if len(vision) != adapter.towers:
        number = "one encoder" if adapter.towers == 1 else "two encoders"
        raise CheckpointError(f"{adapter.file} is the adapter of {number}, {len(vision)} given. {ADVICE}")
    towers = [vision_towers.read_encoder(path, dtype, f"image/encoders/{i}") for i, path in enumerate(vision)]
    decoder, arrays = language_models.read(directory / folder, dtype)
    pictures = ImageConfig(encoders=tuple(c for c, _ in towers), fit=vision_towers.preferred_fit(vision[0]))
    config = ModelConfig(preset="", image=pictures, decoder=decoder, layout="original")
    for _, tower in towers:
        arrays |= tower
    arrays |= read_joint(adapter, config, f"the vision tower {vision[0]}", dtype, assign, arrays)
    if not config.preset:
        shapes = shapes_of(config)
        same = (name for name in presets if shapes_of(preset(name)) == shapes)
        config.preset = next(same, "omnifusion-custom")
    return config, arrays, tokenizer


class AdapterFile:
    """The adapter's file in a directory.

    It has `tensors` by name and the number of vision `towers` that the adapter joins. A pickled module also
    says `settings` and the number of feature `rows` of a picture; otherwise those are empty and None.

    Raises:
      CheckpointError: the file is missing or unsafe, or a module that this library cannot compute.
    """

    def __init__(self, directory: Path):
        self.file = find(directory, ADAPTER)
        self.tensors, self.settings = read_adapter(self.file)
        self.rows = self.settings.pop(ROWS, None)
        self.towers = 1 if any(name.startswith(LAYER) for name in self.tensors) else 2


def read_joint(
    adapter: AdapterFile, config: ModelConfig, tower: str, dtype=None, assign=None, arrays=None
) -> dict[str, Lazy]:
    """{path: Lazy} of the adapter and of the special vectors beside it.

    `config` has the encoders and the decoder; what the files say is set in it. `tower` names the encoder in
    error messages. `arrays` are those of the encoders and the decoder; without them, several readings of a
    two-encoder adapter cannot be compared by `Ambiguous.distances`.
    """
    directory, where = adapter.file.parent, assign or adapter.file
    if adapter.towers == 1:
        a = config.image.adapter
        mlp = len(adapter.tensors.get(f"{LAYER}linear1.bias", "")) or a.mlp
        config.image.adapter = dataclasses.replace(a, mlp=mlp)
        apply_settings(config, adapter.settings, directory / SETTINGS)
        if adapter.rows not in (None, config.image.rows):
            raise CheckpointError(
                f"{adapter.file}: the adapter was made for {adapter.rows} rows a picture, "
                f"{tower} gives {config.image.rows}. "
                "Give the tower that it was trained with: openai/clip-vit-large-patch14-336 has 576"
            )
        table, shapes = adapter_table(config), shapes_of(config, PATH)
        found = from_foreign(adapter.tensors, table, shapes, adapter.file, dtype=dtype)
    else:
        tensors = divided(adapter.tensors, config)
        reading = read_json(assign) if assign else choose(tensors, config, adapter.file, arrays)
        config.image.adapter = adapter_config(reading, tensors, config, where)
        apply_settings(config, adapter.settings, directory / SETTINGS)
        stored = assigned(reading, tensors, config, where)
        found = {path: a.astype(dtype or a.dtype) for path, a in stored.items()}
    special = find(directory, SPECIAL)
    vectors, shapes = open_tensors(special), shapes_of(config, "special")
    return found | from_foreign(vectors, SPECIAL_TABLE, shapes, special, dtype=dtype)


def find_encoders(directory: Path, count: int) -> list[Path]:
    """Paths of the `count` vision towers inside `directory`; CLIP comes first.

    Raises:
      CheckpointError: there are more or fewer.
    """
    folders = (directory, *sorted(directory.glob("*/")), *sorted(directory.glob("*/*/")))
    found = [d for d in folders if vision_towers.is_encoder(d)]
    if len(found) != count:
        names = f" ({', '.join(map(str, found))})" if found else ", as in the published release"
        raise CheckpointError(
            f"{directory}: holds {len(found) or 'no'} vision model{'s' * (len(found) != 1)}{names}. {ADVICE}"
        )
    clip = vision_towers.VISION_FAMILIES["clip"]
    return sorted(found, key=lambda path: vision_towers.family_of(path) is not clip)


def find(directory: Path, name: str) -> Path:
    """The file `name` with the first of SUFFIXES that is there, or with none. Raises CheckpointError."""
    for suffix in (*SUFFIXES, ""):
        file = directory / f"{name}{suffix}"
        if file.is_file():
            return file
    raise CheckpointError(f"{directory}: there is no {name}.pt or {name}.safetensors")


def read_adapter(file: Path) -> tuple[Mapping[str, np.ndarray], dict]:
    """(tensors by name, settings). Only a pickled module says settings; a bare state dict says none."""
    if file.suffix == ".safetensors":
        return open_tensors(file), {}
    module = read_torch_file(file)
    known = not isinstance(module, dict) and LAYER.rstrip(".") in module.state.get("_modules", {})
    return state_dict(module), module_settings(module, file) if known else {}


def module_settings(module, file: Path) -> dict:
    """The settings of the adapter that a pickled VisualToGPTMapping says, by the names of omnifusion.json.

    Raises:
      CheckpointError: it is another module, or computes something else than ours.
    """
    try:
        layer = module.state["_modules"]["transformer_layer"].state
        attention, norm = layer["_modules"]["self_attn"].state, layer["_modules"]["norm1"].state
        found = {
            "adapter.heads": attention["num_heads"],
            "adapter.dropout": attention["dropout"],
            "adapter.eps": norm["eps"],
        }
        rows = module.state.get(ROWS)
        if isinstance(rows, int):
            found[ROWS] = rows
        order = {
            "norm_first": layer.get("norm_first", False),
            "batch_first": attention["batch_first"],
            "activation": layer.get("activation", RELU),
        }
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{file}: the pickled module is not a VisualToGPTMapping "
            f"with a TransformerEncoderLayer ({error!r:.100})"
        ) from error
    require(order, {"norm_first": (False,), "batch_first": (True,), "activation": (RELU,)}, file)
    return found
