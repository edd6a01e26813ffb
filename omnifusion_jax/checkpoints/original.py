"""What is OmniFusion's own in its published files: the adapter's and the special vectors' names, and what lies where."""

from pathlib import Path

from omnifusion_jax.checkpoints import encoders, llama
from omnifusion_jax.checkpoints.engine import MATRIX, SAME, from_foreign, shapes_of, split, split_in, split_out
from omnifusion_jax.checkpoints.files import open_tensors, read_json, require
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
from omnifusion_jax.checkpoints.torch_files import read_torch_file, state_dict
from omnifusion_jax.config import AdapterConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import preset

# What a source directory holds, beside a vision tower of any name
TOKENIZER, DECODER, ADAPTER, SPECIAL, SETTINGS = "tokenizer", "tuned-model", "projection", "special_embeddings", "omnifusion.json"
PUBLISHED = "omnifusion-1.1"  # the preset
RELU = "torch.nn.functional.relu"

# Settings that the published files cannot say; omnifusion.json holds them
UNSAID = (
    "preset", "layout", "prompt", "adapter.heads", "adapter.dropout", "adapter.eps", "encoder.feature_layer", "encoder.keep_class_token",
)  # fmt: skip


def adapter_table(c: ModelConfig):
    """State dict of `VisualToGPTMapping`: one `torch.nn.TransformerEncoderLayer`, whose q, k and v are one matrix, and a `Linear`."""
    heads = c.adapter.heads, c.encoder.embed // c.adapter.heads
    layer = "transformer_layer."
    return {
        layer + "self_attn.in_proj_weight": ("adapter/qkv", split_out(3, *heads)),
        layer + "self_attn.in_proj_bias": ("adapter/qkv_bias", split(3, *heads)),
        layer + "self_attn.out_proj.weight": ("adapter/out", split_in(*heads)),
        layer + "self_attn.out_proj.bias": ("adapter/out_bias", SAME),
        layer + "linear1.weight": ("adapter/up", MATRIX),
        layer + "linear1.bias": ("adapter/up_bias", SAME),
        layer + "linear2.weight": ("adapter/down", MATRIX),
        layer + "linear2.bias": ("adapter/down_bias", SAME),
        layer + "norm1.weight": ("adapter/norm1/scale", SAME),
        layer + "norm1.bias": ("adapter/norm1/bias", SAME),
        layer + "norm2.weight": ("adapter/norm2/scale", SAME),
        layer + "norm2.bias": ("adapter/norm2/bias", SAME),
        "linear.weight": ("adapter/linear", MATRIX),
        "linear.bias": ("adapter/linear_bias", SAME),
    }


SPECIAL_TABLE = {name: (f"special/{name.lower()}", SAME) for name in ("USER", "BOT", "SOI", "EOI")}


def is_original(directory):
    return (directory / DECODER).is_dir() and any(directory.glob(f"{ADAPTER}.*"))


def locate(directory) -> Path | None:
    """The directory with the files: this one, or its only subfolder of that kind (the two-encoder model, whose code was never published, apart)."""
    if is_original(directory):
        return directory
    found = [d for d in sorted(directory.iterdir()) if d.is_dir() and is_original(d) and not d.name.endswith("encoders-mix")]
    if len(found) > 1:
        raise CheckpointError(f"{directory}: several models here ({', '.join(d.name for d in found)}). Give the directory of one.")
    return found[0] if found else None


def read(source, vision=None, dtype=None):
    """(ModelConfig, {path: Lazy}, tokenizer directory) of an original directory.

    Args:
      source: directory, or the one above it as in the published repository.
      vision: directory or file of a vision tower; None looks for one inside `source`.
      dtype: type of the arrays; None keeps what is stored.

    Raises:
      CheckpointError: a file is missing, unsafe, or does not fit the others.
    """
    directory = locate(source)
    tokenizer = fast_tokenizer(directory / TOKENIZER)
    if tokenizer is None:
        raise CheckpointError(f"{directory}/{TOKENIZER}: neither tokenizer.json nor tokenizer.model is there")
    vision = vision or find_encoder(source)
    encoder, arrays = encoders.read_encoder(vision, dtype)
    decoder, decoder_arrays = llama.read(directory / DECODER, dtype)
    adapter_file, special_file = (one_of_two(directory, name) for name in (ADAPTER, SPECIAL))
    tensors, pickled = read_adapter(adapter_file)
    adapter = AdapterConfig(mlp=len(tensors.get("transformer_layer.linear1.bias", "")) or AdapterConfig.mlp)
    config = ModelConfig(preset="", encoder=encoder, adapter=adapter, decoder=decoder, layout="original")
    config.image.fit = encoders.preferred_fit(vision)
    apply_settings(config, pickled, directory / SETTINGS)
    arrays |= decoder_arrays
    arrays |= from_foreign(tensors, adapter_table(config), shapes_of(config, "adapter"), adapter_file, dtype=dtype)
    arrays |= from_foreign(open_tensors(special_file), SPECIAL_TABLE, shapes_of(config, "special"), special_file, dtype=dtype)
    return config, arrays, tokenizer


def find_encoder(directory):
    inside = [directory, *sorted(directory.glob("*")), *sorted(directory.glob("*/*"))]
    found = [d for d in inside if d.is_dir() and encoders.is_encoder(d)]
    if len(found) != 1:
        have = f"several vision models ({', '.join(map(str, found))})" if found else "no vision model, as in the published release"
        raise CheckpointError(f"{directory}: holds {have}. Pass vision (--vision): a directory, or openai/clip-vit-large-patch14-336.")
    return found[0]


def one_of_two(directory, name):
    found = [file for suffix in (".safetensors", ".pt") if (file := directory / f"{name}{suffix}").is_file()]
    if not found:
        raise CheckpointError(f"{directory}: there is no {name}.pt or {name}.safetensors")
    return found[0]


def read_adapter(file):
    """(tensors by name, settings that a pickled module says and a bare state dict does not)."""
    if file.suffix == ".safetensors":
        return open_tensors(file), {}
    module = read_torch_file(file)
    return state_dict(module), {} if isinstance(module, dict) else module_settings(module, file)


def module_settings(module, file):
    try:
        layer = module.state["_modules"]["transformer_layer"].state
        attention, norm = layer["_modules"]["self_attn"].state, layer["_modules"]["norm1"].state
        found = {"adapter.heads": attention["num_heads"], "adapter.dropout": attention["dropout"], "adapter.eps": norm["eps"]}
        order = {"norm_first": layer.get("norm_first", False), "batch_first": attention["batch_first"], "activation": layer.get("activation", RELU)}
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file}: the pickled module is not a VisualToGPTMapping with a TransformerEncoderLayer ({error!r:.100})") from error
    require(order, {"norm_first": (False,), "batch_first": (True,), "activation": (RELU,)}, file)
    return found


def apply_settings(config, pickled, file):
    """Sets what the pickled adapter and, where it is there, omnifusion.json say; what neither says is as published."""
    written = {}
    for key, value in (read_json(file) if file.is_file() else {}).items():
        written |= {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
    for key, value in {**pickled, **written}.items():
        if key not in UNSAID:
            raise CheckpointError(f"{file}: unknown setting {key}; it may hold {', '.join(UNSAID)}")
        if pickled.get(key, value) != value:
            raise CheckpointError(f"{file}: {key} is {value!r}, the pickled adapter says {pickled[key]!r}. Correct or remove it.")
        target, name = at(config, key)
        kind = type(getattr(target, name))
        if not isinstance(value, (int, float) if kind is float else kind):
            raise CheckpointError(f"{file}: {key} is {value!r:.100}, not of type {kind.__name__}")
        setattr(target, name, value)
    config.validate()
    if not config.preset:
        config.preset = PUBLISHED if shapes_of(config) == shapes_of(preset(PUBLISHED)) else "omnifusion-custom"


def settings(config: ModelConfig):
    """What omnifusion.json holds for a config."""
    written = {}
    for key in UNSAID:
        target, name = at(config, key)
        *section, _ = key.split(".")
        (written.setdefault(section[0], {}) if section else written)[name] = getattr(target, name)
    return written


def at(config, key):
    """("adapter.heads" of a ModelConfig) to (config.adapter, "heads")"""
    *section, name = key.split(".")
    return getattr(config, section[0]) if section else config, name
