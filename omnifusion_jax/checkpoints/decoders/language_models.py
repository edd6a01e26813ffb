"""Tensor names and config.json of the language models of Hugging Face.

They are Mistral, Llama, MiniCPM, Qwen2 and Qwen3.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.checkpoints.mapping.transforms import MATRIX, SAME, split, split_in, split_out
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.settings import read_json, require
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import DecoderConfig, ModelConfig, RopeScaling
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.tables import Table

IGNORED = (r".*\.rotary_emb\.inv_freq",)
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"

FIELDS = {  # theirs: ours
    "vocab_size": "vocab",
    "hidden_size": "width",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "eps",
    "tie_word_embeddings": "tied",
}
ROPE = {  # theirs: ours, for rope scaling of the type "llama3"
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "trained_length",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of config.json."""

    architecture: str  # the class that is written into config.json

    # transformers' values of what config.json leaves out. None for key-value heads: as many as heads.
    defaults: dict
    # Fields of DecoderConfig that all models of the family share, with their values.
    fixed: dict = dataclasses.field(default_factory=dict)
    window: bool = False  # whether the setting sliding_window is our `window`
    # Supported values of settings that not every family has.
    only: dict = dataclasses.field(default_factory=dict)
    # Settings from which the multipliers follow, with transformers' values of what config.json leaves out.
    scales: dict = dataclasses.field(default_factory=dict)


SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
QWEN = {
    **SIZES,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
FAMILIES = Table(
    "family of language models",
    rows={
        "mistral": Family(
            "MistralForCausalLM",
            {
                **SIZES,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
            window=True,
        ),
        "llama": Family(
            "LlamaForCausalLM",
            {
                **SIZES,
                "intermediate_size": 11008,
                "num_key_value_heads": None,
                "max_position_embeddings": 2048,
            },
        ),
        "minicpm": Family(
            "MiniCPMForCausalLM",
            {
                **SIZES,
                "intermediate_size": 11008,
                "num_key_value_heads": None,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            },
            scales={"scale_emb": 1, "scale_depth": 1, "dim_model_base": 1},
        ),
        "qwen2": Family(
            "Qwen2ForCausalLM", QWEN, {"qkv_bias": True}, only={"use_sliding_window": (False, None)}
        ),
        "qwen3": Family(
            "Qwen3ForCausalLM",
            {**QWEN, "head_dim": 128},
            {"qk_norm": True},
            only={"use_sliding_window": (False, None)},
        ),
    },
)
ONLY = {  # supported values; models with others compute what our decoder does not
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
}


def table(c: DecoderConfig, path: str = "decoder") -> dict[str, tuple]:
    """The table for the parameters that a decoder of config `c` has, with our paths under `path`."""
    layer, attention, ours = "model.layers.{}.", "model.layers.{}.self_attn.", path + "/layers/"
    heads = {
        "q": ("query", (c.kv_heads, c.group, c.head_dim)),
        "k": ("key", (c.kv_heads, c.head_dim)),
        "v": ("value", (c.kv_heads, c.head_dim)),
    }
    rows = {EMBED: (f"{path}/embed", SAME)}
    for name, (projection, dims) in heads.items():
        rows[f"{attention}{name}_proj.weight"] = (f"{ours}attention/{projection}/kernel", split_out(*dims))
        if c.qkv_bias:
            rows[f"{attention}{name}_proj.bias"] = (f"{ours}attention/{projection}/bias", split(*dims))
        if c.qk_norm and projection != "value":
            rows[f"{attention}{name}_norm.weight"] = (f"{ours}attention/{projection}_norm/scale", SAME)
    out = split_in(c.kv_heads, c.group, c.head_dim)
    rows |= {
        attention + "o_proj.weight": (ours + "attention/out/kernel", out),
        layer + "mlp.gate_proj.weight": (ours + "feed_forward/gate/kernel", MATRIX),
        layer + "mlp.up_proj.weight": (ours + "feed_forward/up/kernel", MATRIX),
        layer + "mlp.down_proj.weight": (ours + "feed_forward/down/kernel", MATRIX),
        layer + "input_layernorm.weight": (ours + "norm1/scale", SAME),
        layer + "post_attention_layernorm.weight": (ours + "norm2/scale", SAME),
        "model.norm.weight": (f"{path}/norm/scale", SAME),
    }
    return rows if c.tied else rows | {HEAD: (f"{path}/head", MATRIX)}


def without_copy(
    tensors: Mapping[str, np.ndarray], c: DecoderConfig, where: str | Path, prefix: str = ""
) -> Mapping[str, np.ndarray]:
    """The tensors without the copy of the embeddings that some files hold as the head, where it is tied.

    The names of the tensors begin with `prefix`.

    Raises:
      CheckpointError: the head is tied, and is not a copy of the embeddings.
    """
    head, embed = prefix + HEAD, prefix + EMBED
    if not c.tied or head not in tensors:
        return tensors
    if embed in tensors and not np.array_equal(np.asarray(tensors[head]), np.asarray(tensors[embed])):
        raise CheckpointError(
            f"{where}: tie_word_embeddings is true, but {head} is not {embed}. "
            "Set it to false, or remove the head"
        )
    return {name: a for name, a in tensors.items() if name != head}


def decoder_config(hf: dict, where: str | Path = "config.json") -> DecoderConfig:
    """The config that the config.json of a model of one of FAMILIES describes, from transformers 4 or 5.

    Raises:
      CheckpointError: our decoder does not support a setting.
    """
    kind = hf.get("model_type", "mistral")
    require({"model_type": kind}, {"model_type": tuple(FAMILIES)}, where)
    family = FAMILIES[kind]
    require(hf, ONLY | family.only, where)
    values = {theirs: hf.get(theirs, family.defaults[theirs]) for theirs in FIELDS}
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    ours = {FIELDS[theirs]: value for theirs, value in values.items()}
    config = DecoderConfig(family=kind, **family.fixed, **ours)
    config.window = hf.get("sliding_window", family.defaults["sliding_window"]) if family.window else None
    config.head_dim = hf.get("head_dim") or family.defaults.get("head_dim") or config.width // config.heads
    # transformers 4 writes rope_scaling, transformers 5 rope_parameters.
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    config.rope_theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    config.rope_scaling = rope_scaling(rope, where)
    if family.scales:
        apply_scales(config, {name: hf.get(name, value) for name, value in family.scales.items()})
    config.validate()
    return config


def apply_scales(c: DecoderConfig, settings: dict):
    """Sets the multipliers of MiniCPM (arXiv 2404.06395), whose config.json has what they follow from."""
    c.embed_scale = float(settings["scale_emb"])
    c.residual_scale = settings["scale_depth"] / math.sqrt(c.layers)
    c.logit_scale = settings["dim_model_base"] / c.width


def scales_json(c: DecoderConfig) -> dict:
    """The settings that `apply_scales` reads as the multipliers of `c`, without errors of rounding."""
    found = (c.embed_scale, c.residual_scale * math.sqrt(c.layers), c.logit_scale * c.width)
    rounded = (round(value, 9) for value in found)
    names = ("scale_emb", "scale_depth", "dim_model_base")
    return {
        name: int(value) if value.is_integer() else value for name, value in zip(names, rounded, strict=True)
    }


def rope_scaling(rope: dict, where: str | Path) -> RopeScaling | None:
    """The rope scaling that config.json describes, or None where it describes none.

    Raises:
      CheckpointError: the type is not supported, or a setting of it is missing.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    require({"rope scaling": kind}, {"rope scaling": ("default", "llama3")}, where)
    if kind == "default":
        return None
    if missing := [name for name in ROPE if name not in rope]:
        raise CheckpointError(f"{where}: rope scaling of the type llama3 has no {', '.join(missing)}")
    return RopeScaling(**{ours: rope[theirs] for theirs, ours in ROPE.items()})


def decoder_json(c: DecoderConfig, dtype: str, ends: dict | None = None) -> dict:
    """The config.json of the language model alone.

    Args:
      c: the decoder.
      dtype: of the weights, as config.json names it.
      ends: bos_token_id and eos_token_id; None gives 1 and 2.

    Raises:
      CheckpointError: no model of the family computes what `c` says.
    """
    family = FAMILIES[c.family]
    written = {
        "architectures": [family.architecture],
        "model_type": c.family,
        "hidden_act": "silu",
        "head_dim": c.head_dim,
        "rope_theta": c.rope_theta,
        "torch_dtype": dtype,
        "use_cache": True,
        **(ends or {"bos_token_id": 1, "eos_token_id": 2}),
        **{theirs: getattr(c, ours) for theirs, ours in FIELDS.items()},
        **({"sliding_window": c.window} if family.window else {}),
        **(scales_json(c) if family.scales else {}),
    }
    if c.rope_scaling:
        scaling = {theirs: getattr(c.rope_scaling, ours) for theirs, ours in ROPE.items()}
        written["rope_scaling"] = {"rope_type": "llama3", **scaling}
    back = decoder_config(written)
    names = [field.name for field in dataclasses.fields(c)]
    lost = [name for name in names if getattr(back, name) != getattr(c, name)]
    if lost:
        told = ", ".join(f"{name}={getattr(c, name)!r}" for name in lost)
        raise CheckpointError(
            f"a language model of the family {c.family} has no {told}; "
            f"decoder.family may be one of {', '.join(FAMILIES)}"
        )
    return written


def is_decoder(directory: str | Path) -> bool:
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in FAMILIES


def read(directory: str | Path, dtype=None) -> tuple[DecoderConfig, dict[str, Lazy]]:
    """The config and the arrays, by path ("decoder/..."), of a directory with a model of one of FAMILIES.

    Raises:
      CheckpointError: there is no such model, a setting is not supported, or tensors do not fit
        (all are listed).
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no language model, there is no config.json")
    config = decoder_config(read_json(file), file)
    tensors = without_copy(open_tensors(directory), config, directory)
    shapes = shapes_of(ModelConfig(decoder=config), "decoder")
    return config, from_foreign(tensors, table(config), shapes, directory, ignore=IGNORED, dtype=dtype)
