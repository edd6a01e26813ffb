"""What is OmniFusion's own in its published files: the adapter's and the special vectors' names, and what lies where."""

import dataclasses
from pathlib import Path

from omnifusion_jax.checkpoints import decoders, encoders
from omnifusion_jax.checkpoints.assign import adapter_config, assigned, choose, divided
from omnifusion_jax.checkpoints.engine import MATRIX, SAME, Fused, from_foreign, shapes_of, split, split_in, split_out
from omnifusion_jax.checkpoints.files import open_tensors, read_json, require
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
from omnifusion_jax.checkpoints.torch_files import read_torch_file, state_dict
from omnifusion_jax.config import ImageConfig, ModelConfig, tuples
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import preset

# What a source directory holds, beside a vision tower of any name
TOKENIZER, DECODER, ADAPTER, SPECIAL, SETTINGS = "tokenizer", "tuned-model", "projection", "special_embeddings", "omnifusion.json"
FIRST = "OmniMistral-model"  # the decoder's folder in release 1.0, beside the other files
RELEASES = {  # the decoder's folder: (the tokenizer's, presets)
    DECODER: (TOKENIZER, ("omnifusion-1.1", "omnifusion-1.1-mix")),
    FIRST: ("OmniMistral-tokenizer", ("omnifusion-1.0",)),
}
SUFFIXES = (".safetensors", ".pt", "")  # of the adapter's and the vectors' file; release 1.0 has none
LAYER = "transformer_layer."  # what the tensors of the one-encoder adapter begin with
ADVICE = (
    "Pass vision (--vision), a directory, or openai/clip-vit-large-patch14-336; for the two-encoder model vision2 (--vision2) besides, "
    "facebook/dinov2-large."
)
ROWS = "n_embeddings"  # attribute of the pickled adapter: the rows of a picture
RELU = "torch.nn.functional.relu"

PATH = "image/adapter"  # the part of a model that the adapter is
ENCODERS = "encoders"  # in omnifusion.json: the names of the vision towers' directories

# Settings that the published files cannot say; omnifusion.json holds them
UNSAID = (
    "preset", "layout", "prompt", "image.fit", "image.unpad", "image.grids",
    "adapter.heads", "adapter.dropout", "adapter.eps", "adapter.align", "adapter.activation",
    "encoder.feature_layer", "encoder.feature_norm", "encoder.keep_class_token",
    "encoder2.feature_layer", "encoder2.feature_norm", "encoder2.keep_class_token",
)  # fmt: skip


def adapter_table(c: ModelConfig):
    """State dict of `VisualToGPTMapping`: one `torch.nn.TransformerEncoderLayer`, whose q, k and v are one matrix, and a `Linear`."""
    heads = c.image.adapter.heads, c.image.encoders[0].embed // c.image.adapter.heads
    layer = LAYER
    return {
        layer + "self_attn.in_proj_weight": packed("kernel", split_out(*heads)),
        layer + "self_attn.in_proj_bias": packed("bias", split(*heads)),
        layer + "self_attn.out_proj.weight": ("image/adapter/layer/attention/out/kernel", split_in(*heads)),
        layer + "self_attn.out_proj.bias": ("image/adapter/layer/attention/out/bias", SAME),
        layer + "linear1.weight": ("image/adapter/layer/feed_forward/up/kernel", MATRIX),
        layer + "linear1.bias": ("image/adapter/layer/feed_forward/up/bias", SAME),
        layer + "linear2.weight": ("image/adapter/layer/feed_forward/down/kernel", MATRIX),
        layer + "linear2.bias": ("image/adapter/layer/feed_forward/down/bias", SAME),
        layer + "norm1.weight": ("image/adapter/layer/norm1/scale", SAME),
        layer + "norm1.bias": ("image/adapter/layer/norm1/bias", SAME),
        layer + "norm2.weight": ("image/adapter/layer/norm2/scale", SAME),
        layer + "norm2.bias": ("image/adapter/layer/norm2/bias", SAME),
        "linear.weight": ("image/adapter/linear/kernel", MATRIX),
        "linear.bias": ("image/adapter/linear/bias", SAME),
    }


def packed(name, transform):
    """PyTorch keeps queries, keys and values in one tensor."""
    return Fused(*((f"image/adapter/layer/attention/{part}/{name}", transform) for part in ("query", "key", "value")))


SPECIAL_TABLE = {name: (f"special/{name.lower()}", SAME) for name in ("USER", "BOT", "SOI", "EOI")}


def locate(directory) -> tuple[Path, str] | None:
    """(the directory with the files, the name of the decoder's folder there); None where there is no release.

    The files lie in this directory, or in its only subfolder that has them, the two-encoder model apart,
    whose code was never published. Those of release 1.0 lie beside its decoder's folder, which stands for it.
    """
    found = [d for d in sorted(directory.iterdir()) if d.is_dir() and holds(d, DECODER) and not d.name.endswith("encoders-mix")]
    if holds(directory, DECODER):
        return directory, DECODER
    if len(found) > 1:
        raise CheckpointError(f"{directory}: several models here ({', '.join(d.name for d in found)}). Give the directory of one.")
    if found:
        return found[0], DECODER
    top = directory.parent if directory.name == FIRST else directory
    return (top, FIRST) if holds(top, FIRST) else None


def holds(directory, decoder):
    return (directory / decoder).is_dir() and any(directory.glob(f"{ADAPTER}*"))


def read(source, vision=(), dtype=None, assign=None):
    """(ModelConfig, {path: Lazy}, tokenizer directory) of an original directory.

    Args:
      source: directory, or the one above it as in the published repository.
      vision: directories or files of one or two vision towers; none: they are looked for inside `source`.
      dtype: type of the arrays; None keeps what is stored.
      assign: JSON file that says what the tensors of a two-encoder adapter are, see checkpoints/assign.py; None: found out.

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
    vision = vision or named_encoders(directory) or find_encoders(directory if source.parent == directory else source, adapter.towers)
    if len(vision) != adapter.towers:
        number = "one encoder" if adapter.towers == 1 else "two encoders"
        raise CheckpointError(f"{adapter.file} is the adapter of {number}, {len(vision)} given. {ADVICE}")
    towers = [encoders.read_encoder(path, dtype, f"image/encoders/{i}") for i, path in enumerate(vision)]
    decoder, arrays = decoders.read(directory / folder, dtype)
    pictures = ImageConfig(encoders=tuple(c for c, _ in towers), fit=encoders.preferred_fit(vision[0]))
    config = ModelConfig(preset="", image=pictures, decoder=decoder, layout="original")
    for _, tower in towers:
        arrays |= tower
    arrays |= read_joint(adapter, config, f"the vision tower {vision[0]}", dtype, assign, arrays)
    if not config.preset:
        config.preset = next((name for name in presets if shapes_of(config) == shapes_of(preset(name))), "omnifusion-custom")
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
        config.image.adapter = dataclasses.replace(a, mlp=len(adapter.tensors.get(f"{LAYER}linear1.bias", "")) or a.mlp)
        apply_settings(config, adapter.settings, directory / SETTINGS)
        if adapter.rows not in (None, config.image.rows):
            raise CheckpointError(
                f"{adapter.file}: the adapter was made for {adapter.rows} rows a picture, {tower} gives {config.image.rows}. "
                "Give the tower that it was trained with: openai/clip-vit-large-patch14-336 has 576"
            )
        found = from_foreign(adapter.tensors, adapter_table(config), shapes_of(config, PATH), adapter.file, dtype=dtype)
    else:
        tensors = divided(adapter.tensors, config)
        reading = read_json(assign) if assign else choose(tensors, config, adapter.file, arrays)
        config.image.adapter = adapter_config(reading, tensors, config, where)
        apply_settings(config, adapter.settings, directory / SETTINGS)
        found = {path: a.astype(dtype or a.dtype) for path, a in assigned(reading, tensors, config, where).items()}
    special = find(directory, SPECIAL)
    return found | from_foreign(open_tensors(special), SPECIAL_TABLE, shapes_of(config, "special"), special, dtype=dtype)


def named_encoders(directory):
    """Paths of vision towers as omnifusion.json names them, in order; none where it does not."""
    file = directory / SETTINGS
    names = read_json(file).get(ENCODERS, []) if file.is_file() else []
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{file}: {ENCODERS} is {names!r:.100}, not a list of directories beside it")
    return [directory / name for name in names]


def find_encoders(directory, count):
    """Paths of vision towers inside `directory`; of two CLIP comes first."""
    found = [d for d in (directory, *sorted(directory.glob("*/")), *sorted(directory.glob("*/*/"))) if encoders.is_encoder(d)]
    if len(found) != count:
        names = f" ({', '.join(map(str, found))})" if found else ", as in the published release"
        raise CheckpointError(f"{directory}: holds {len(found) or 'no'} vision model{'s' * (len(found) != 1)}{names}. {ADVICE}")
    return sorted(found, key=lambda path: encoders.family_of(path) is not encoders.VISION_FAMILIES["clip"])


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
        found = {"adapter.heads": attention["num_heads"], "adapter.dropout": attention["dropout"], "adapter.eps": norm["eps"]}
        if isinstance(rows := module.state.get(ROWS), int):
            found[ROWS] = rows
        order = {"norm_first": layer.get("norm_first", False), "batch_first": attention["batch_first"], "activation": layer.get("activation", RELU)}
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file}: the pickled module is not a VisualToGPTMapping with a TransformerEncoderLayer ({error!r:.100})") from error
    require(order, {"norm_first": (False,), "batch_first": (True,), "activation": (RELU,)}, file)
    return found


def apply_settings(config, pickled, file):
    """Sets what the pickled adapter and, where it is there, omnifusion.json say; what neither says is as published."""
    written = {}
    for key, value in (read_json(file) if file.is_file() else {}).items():
        if key == ENCODERS:
            continue
        written |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    for key, value in {**pickled, **written}.items():
        if key not in UNSAID:
            raise CheckpointError(f"{file}: unknown setting {key}; it may hold {', '.join(UNSAID)}")
        if pickled.get(key, value) != value:
            raise CheckpointError(f"{file}: {key} is {value!r}, the pickled adapter says {pickled[key]!r}. Correct or remove it.")
        target, name = at(config, key)
        if target is None:
            raise CheckpointError(f"{file}: {key} is of a second encoder, and there is one. Remove it.")
        if not hasattr(target, name):
            raise CheckpointError(f"{file}: an adapter of the kind {target.kind!r} has no {key}. Remove it.")
        kind, value = type(getattr(target, name)), tuples(value)
        if not isinstance(value, (int, float) if kind is float else kind):
            raise CheckpointError(f"{file}: {key} is {value!r:.100}, not of type {kind.__name__}")
        setattr(target, name, value)
    config.validate()


def settings(config: ModelConfig):
    """What omnifusion.json holds for a config."""
    written = {}
    for key in UNSAID:
        target, name = at(config, key)
        if target is None or not hasattr(target, name):
            continue
        *section, _ = key.split(".")
        (written.setdefault(section[0], {}) if section else written)[name] = getattr(target, name)
    return written


def at(config, key):
    """("adapter.heads" of a ModelConfig) to (config.image.adapter, "heads"); of a second encoder that is not there (None, name)."""
    section, _, name = key.rpartition(".")
    first, *rest = config.image.encoders
    sections = {"": config, "image": config.image, "adapter": config.image.adapter, "encoder": first, "encoder2": rest[0] if rest else None}
    return sections[section], name
