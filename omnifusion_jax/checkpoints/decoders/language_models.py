"""Language models of Hugging Face by family, Mistral, Llama, Qwen2 and Qwen3: tensor names and config.json."""

import dataclasses
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.checkpoints.mapping.transforms import MATRIX, SAME, split, split_in, split_out
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
ROPE = {  # theirs: ours, of the type "llama3"
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "trained_length",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model type of config.json."""

    architecture: str
    defaults: dict  # of transformers' config, for a file that leaves a field out; None for key-value heads: as many as heads
    fixed: dict = dataclasses.field(
        default_factory=dict
    )  # fields of DecoderConfig that all its models have in common
    window: bool = False  # whether sliding_window says our `window`
    only: dict = dataclasses.field(
        default_factory=dict
    )  # settings of its own with which our decoder computes something else


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
ONLY = {  # settings with which our decoder computes something else
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
}


def table(c: DecoderConfig, path="decoder"):
    """Rows of everything that a decoder of these families can have; the engine leaves out those it has not."""
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
    rows |= {
        attention + "o_proj.weight": (
            ours + "attention/out/kernel",
            split_in(c.kv_heads, c.group, c.head_dim),
        ),
        layer + "mlp.gate_proj.weight": (ours + "feed_forward/gate/kernel", MATRIX),
        layer + "mlp.up_proj.weight": (ours + "feed_forward/up/kernel", MATRIX),
        layer + "mlp.down_proj.weight": (ours + "feed_forward/down/kernel", MATRIX),
        layer + "input_layernorm.weight": (ours + "norm1/scale", SAME),
        layer + "post_attention_layernorm.weight": (ours + "norm2/scale", SAME),
        "model.norm.weight": (f"{path}/norm/scale", SAME),
    }
    return rows if c.tied else rows | {HEAD: (f"{path}/head", MATRIX)}


def without_copy(tensors, c: DecoderConfig, where, prefix=""):
    """The tensors, whose names begin with `prefix`, without the copy of the embeddings that some files of a tied head hold.

    Raises:
      CheckpointError: it is no copy.
    """
    head, embed = prefix + HEAD, prefix + EMBED
    if not c.tied or head not in tensors:
        return tensors
    if embed in tensors and not np.array_equal(np.asarray(tensors[head]), np.asarray(tensors[embed])):
        raise CheckpointError(
            f"{where}: tie_word_embeddings is true, but {head} is not {embed}. Set it to false, or remove the head"
        )
    return {name: a for name, a in tensors.items() if name != head}


def decoder_config(hf, where="config.json") -> DecoderConfig:
    """From the config.json of a model of one of FAMILIES, of transformers 4 or 5.

    Raises:
      CheckpointError: a setting our decoder does not have.
    """
    kind = hf.get("model_type", "mistral")
    require({"model_type": kind}, {"model_type": tuple(FAMILIES)}, where)
    family = FAMILIES[kind]
    require(hf, ONLY | family.only, where)
    values = {theirs: hf.get(theirs, family.defaults[theirs]) for theirs in FIELDS}
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    config = DecoderConfig(
        family=kind, **family.fixed, **{FIELDS[theirs]: value for theirs, value in values.items()}
    )
    config.window = hf.get("sliding_window", family.defaults["sliding_window"]) if family.window else None
    config.head_dim = hf.get("head_dim") or family.defaults.get("head_dim") or config.width // config.heads
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}  # transformers 4, 5
    config.rope_theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    config.rope_scaling = rope_scaling(rope, where)
    config.validate()
    return config


def rope_scaling(rope, where):
    """RopeScaling, or None, of what config.json says."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    require({"rope scaling": kind}, {"rope scaling": ("default", "llama3")}, where)
    if kind == "default":
        return None
    if missing := [name for name in ROPE if name not in rope]:
        raise CheckpointError(f"{where}: rope scaling of the type llama3 has no {', '.join(missing)}")
    return RopeScaling(**{ours: rope[theirs] for theirs, ours in ROPE.items()})


def decoder_json(c: DecoderConfig, dtype, ends=None):
    """The config.json of the language model alone; `ends` are its bos_token_id and eos_token_id.

    Raises:
      CheckpointError: no model of its family computes this.
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
    }
    if c.rope_scaling:
        written["rope_scaling"] = {"rope_type": "llama3"} | {
            theirs: getattr(c.rope_scaling, ours) for theirs, ours in ROPE.items()
        }
    back = decoder_config(written)
    lost = [
        field.name for field in dataclasses.fields(c) if getattr(back, field.name) != getattr(c, field.name)
    ]
    if lost:
        told = ", ".join(f"{name}={getattr(c, name)!r}" for name in lost)
        raise CheckpointError(
            f"a language model of the family {c.family} has no {told}; decoder.family may be one of {', '.join(FAMILIES)}"
        )
    return written


def is_decoder(directory):
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in FAMILIES


def read(directory, dtype=None):
    """(DecoderConfig, {"decoder/...": Lazy}) of a directory of one of FAMILIES.

    Raises:
      CheckpointError: it is no such directory, a setting is not supported, or tensors do not fit (all are listed).
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no language model, there is no config.json")
    config = decoder_config(read_json(file), file)
    tensors = without_copy(open_tensors(directory), config, directory)
    shapes = shapes_of(ModelConfig(decoder=config), "decoder")
    return config, from_foreign(tensors, table(config), shapes, directory, ignore=IGNORED, dtype=dtype)
