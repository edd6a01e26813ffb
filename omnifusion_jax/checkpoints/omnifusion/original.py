"""What is OmniFusion's own in its published files: the adapter's and the special vectors' names, and what lies where."""

import dataclasses
from pathlib import Path

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import vision_towers
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.checkpoints.omnifusion.settings import SETTINGS, apply_settings, named_encoders
from omnifusion_jax.checkpoints.omnifusion.tables import LAYER, SPECIAL_TABLE, adapter_table
from omnifusion_jax.checkpoints.omnifusion.two_encoders import adapter_config, assigned, choose, divided
from omnifusion_jax.checkpoints.storage.settings import read_json, require
from omnifusion_jax.checkpoints.storage.torch_files import read_torch_file, state_dict
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
from omnifusion_jax.config import ImageConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import preset

# What a source directory holds, beside a vision tower of any name
TOKENIZER, DECODER, ADAPTER, SPECIAL = "tokenizer", "tuned-model", "projection", "special_embeddings"
FIRST = "OmniMistral-model"  # the decoder's folder in release 1.0, beside the other files
RELEASES = {  # the decoder's folder: (the tokenizer's, presets)
    DECODER: (TOKENIZER, ("omnifusion-1.1", "omnifusion-1.1-mix")),
    FIRST: ("OmniMistral-tokenizer", ("omnifusion-1.0",)),
}
SUFFIXES = (".safetensors", ".pt", "")  # of the adapter's and the vectors' file; release 1.0 has none
ADVICE = (
    "Pass vision (--vision), a directory, or openai/clip-vit-large-patch14-336; for the two-encoder model vision2 (--vision2) besides, "
    "facebook/dinov2-large."
)
ROWS = "n_embeddings"  # attribute of the pickled adapter: the rows of a picture
RELU = "torch.nn.functional.relu"

PATH = "image/adapter"  # the part of a model that the adapter is


def locate(directory) -> tuple[Path, str] | None:
    """(the directory with the files, the name of the decoder's folder there); None where there is no release.

    The files lie in this directory, or in its only subfolder that has them, the two-encoder model apart,
    whose code was never published. Those of release 1.0 lie beside its decoder's folder, which stands for it.
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
            f"{directory}: several models here ({', '.join(d.name for d in found)}). Give the directory of one."
        )
    if found:
        return found[0], DECODER
    top = directory.parent if directory.name == FIRST else directory
    return (top, FIRST) if holds(top, FIRST) else None


def holds(directory, decoder):
    return (directory / decoder).is_dir() and any(directory.glob(f"{ADAPTER}*"))


def read(source, dtype=None, vision=(), assign=None):
    """(ModelConfig, {path: Lazy}, tokenizer directory) of an original directory.

    Args:
      source: directory, or the one above it as in the published repository.
      vision: directories or files of one or two vision towers; none: they are looked for inside `source`.
      dtype: type of the arrays; None keeps what is stored.
      assign: JSON file that says what the tensors of a two-encoder adapter are, see checkpoints/omnifusion/two_encoders.py; None: found out.

    Raises:
      CheckpointError: a file is missing, unsafe, or does not fit the others.
      assign.Ambiguous: a two-encoder adapter can be read in several ways.
    """
    directory, folder = locate(source)
    words, presets = RELEASES[folder]
    tokenizer = fast_tokenizer(directory / words)
    if tokenizer is None:
        raise CheckpointError(f"{directory}/{words}: neither tokenizer.json nor tokenizer.model is there")
    adapter = AdapterFile(directory)
    vision = (
        vision
        or named_encoders(directory)
        or find_encoders(directory if source.parent == directory else source, adapter.towers)
    )
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
        config.preset = next(
            (name for name in presets if shapes_of(config) == shapes_of(preset(name))), "omnifusion-custom"
        )
    return config, arrays, tokenizer


class AdapterFile:
    """The adapter in a directory: `tensors` by name, `settings` and `rows` of a picture where a pickled
    module says them, and the number of vision `towers` that it joins.

    Raises:
      CheckpointError: it is not there, unsafe, or a module that ours does not compute.
    """

    def __init__(self, directory):
        self.file = find(directory, ADAPTER)
        self.tensors, self.settings = read_adapter(self.file)
        self.rows = self.settings.pop(ROWS, None)
        self.towers = 1 if any(name.startswith(LAYER) for name in self.tensors) else 2


def read_joint(adapter: AdapterFile, config: ModelConfig, tower, dtype=None, assign=None, arrays=None):
    """{path: Lazy} of the adapter and the special vectors beside it.

    `config` has encoders and decoder, and gets what the files say. `tower` names the encoder in errors.
    `arrays` are those of encoders and decoder, without which readings of a two-encoder adapter have no rank.
    """
    directory, where = adapter.file.parent, assign or adapter.file
    if adapter.towers == 1:
        a = config.image.adapter
        config.image.adapter = dataclasses.replace(
            a, mlp=len(adapter.tensors.get(f"{LAYER}linear1.bias", "")) or a.mlp
        )
        apply_settings(config, adapter.settings, directory / SETTINGS)
        if adapter.rows not in (None, config.image.rows):
            raise CheckpointError(
                f"{adapter.file}: the adapter was made for {adapter.rows} rows a picture, {tower} gives {config.image.rows}. "
                "Give the tower that it was trained with: openai/clip-vit-large-patch14-336 has 576"
            )
        found = from_foreign(
            adapter.tensors, adapter_table(config), shapes_of(config, PATH), adapter.file, dtype=dtype
        )
    else:
        tensors = divided(adapter.tensors, config)
        reading = read_json(assign) if assign else choose(tensors, config, adapter.file, arrays)
        config.image.adapter = adapter_config(reading, tensors, config, where)
        apply_settings(config, adapter.settings, directory / SETTINGS)
        found = {
            path: a.astype(dtype or a.dtype) for path, a in assigned(reading, tensors, config, where).items()
        }
    special = find(directory, SPECIAL)
    return found | from_foreign(
        open_tensors(special), SPECIAL_TABLE, shapes_of(config, "special"), special, dtype=dtype
    )


def find_encoders(directory, count):
    """Paths of vision towers inside `directory`; of two CLIP comes first."""
    found = [
        d
        for d in (directory, *sorted(directory.glob("*/")), *sorted(directory.glob("*/*/")))
        if vision_towers.is_encoder(d)
    ]
    if len(found) != count:
        names = f" ({', '.join(map(str, found))})" if found else ", as in the published release"
        raise CheckpointError(
            f"{directory}: holds {len(found) or 'no'} vision model{'s' * (len(found) != 1)}{names}. {ADVICE}"
        )
    return sorted(
        found, key=lambda path: vision_towers.family_of(path) is not vision_towers.VISION_FAMILIES["clip"]
    )


def find(directory, name):
    """The file `name` of one of SUFFIXES."""
    found = [file for suffix in SUFFIXES if (file := directory / f"{name}{suffix}").is_file()]
    if not found:
        raise CheckpointError(f"{directory}: there is no {name}.pt or {name}.safetensors")
    return found[0]


def read_adapter(file):
    """(tensors by name, settings that a pickled module says and a bare state dict does not)."""
    if file.suffix == ".safetensors":
        return open_tensors(file), {}
    module = read_torch_file(file)
    known = not isinstance(module, dict) and LAYER.rstrip(".") in module.state.get("_modules", {})
    return state_dict(module), module_settings(module, file) if known else {}


def module_settings(module, file):
    try:
        layer = module.state["_modules"]["transformer_layer"].state
        attention, norm = layer["_modules"]["self_attn"].state, layer["_modules"]["norm1"].state
        found = {
            "adapter.heads": attention["num_heads"],
            "adapter.dropout": attention["dropout"],
            "adapter.eps": norm["eps"],
        }
        if isinstance(rows := module.state.get(ROWS), int):
            found[ROWS] = rows
        order = {
            "norm_first": layer.get("norm_first", False),
            "batch_first": attention["batch_first"],
            "activation": layer.get("activation", RELU),
        }
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{file}: the pickled module is not a VisualToGPTMapping with a TransformerEncoderLayer ({error!r:.100})"
        ) from error
    require(order, {"norm_first": (False,), "batch_first": (True,), "activation": (RELU,)}, file)
    return found
