"""Hugging Face `LlamaForCausalLM` and `MistralForCausalLM`: tensor names and config.json."""

from pathlib import Path

from omnifusion_jax.checkpoints.engine import MATRIX, SAME, from_foreign, shapes_of, split_in, split_out
from omnifusion_jax.checkpoints.files import open_tensors, read_json, require
from omnifusion_jax.config import DecoderConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError

IGNORED = (r".*\.rotary_emb\.inv_freq",)

FIELDS = {  # theirs: ours
    "vocab_size": "vocab",
    "hidden_size": "embed",
    "intermediate_size": "mlp",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "max_length",
    "rms_norm_eps": "eps",
    "sliding_window": "window",
}
SHARED = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}
DEFAULTS = {  # of transformers' configs, by model type, for a file that leaves a field out; None for key-value heads: as many as heads
    "mistral": {**SHARED, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "llama": {**SHARED, "intermediate_size": 11008, "num_key_value_heads": None, "max_position_embeddings": 2048},
}
CLASSES = {"mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
ONLY = {  # settings with which our decoder computes something else
    "model_type": tuple(DEFAULTS),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
}


def table(c: DecoderConfig, path="decoder"):
    layer, ours = "model.layers.{}.", path + "/layers/"
    return {
        "model.embed_tokens.weight": (f"{path}/embed", SAME),
        layer + "self_attn.q_proj.weight": (ours + "attention/query", split_out(c.kv_heads, c.group, c.head_dim)),
        layer + "self_attn.k_proj.weight": (ours + "attention/key", split_out(c.kv_heads, c.head_dim)),
        layer + "self_attn.v_proj.weight": (ours + "attention/value", split_out(c.kv_heads, c.head_dim)),
        layer + "self_attn.o_proj.weight": (ours + "attention/out", split_in(c.kv_heads, c.group, c.head_dim)),
        layer + "mlp.gate_proj.weight": (ours + "gate", MATRIX),
        layer + "mlp.up_proj.weight": (ours + "up", MATRIX),
        layer + "mlp.down_proj.weight": (ours + "down", MATRIX),
        layer + "input_layernorm.weight": (ours + "norm1/scale", SAME),
        layer + "post_attention_layernorm.weight": (ours + "norm2/scale", SAME),
        "model.norm.weight": (f"{path}/norm/scale", SAME),
        "lm_head.weight": (f"{path}/head", MATRIX),
    }


def untied(tensors, hf, prefix=""):
    """The tensors, whose names begin with `prefix`, with a head of their own: a copy of the embeddings where config.json ties them."""
    head, embed = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if not hf.get("tie_word_embeddings") or head in tensors or embed not in tensors:
        return tensors
    return {**tensors, head: tensors[embed]}


def decoder_config(hf, where="config.json") -> DecoderConfig:
    """From the config.json of a `LlamaForCausalLM` or `MistralForCausalLM`, of transformers 4 or 5.

    Raises:
      CheckpointError: a setting our decoder does not have.
    """
    require(hf, ONLY, where)
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}  # transformers 4, 5
    require({"rope scaling": rope.get("rope_type", rope.get("type", "default"))}, {"rope scaling": ("default",)}, where)
    kind = hf.get("model_type", "mistral")
    values = {theirs: hf.get(theirs, default) for theirs, default in DEFAULTS[kind].items()}
    values["num_key_value_heads"] = values["num_key_value_heads"] or values["num_attention_heads"]
    config = DecoderConfig(model_type=kind, **{"window": None, **{FIELDS[theirs]: value for theirs, value in values.items()}})
    config.rope_theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    config.head_dim = hf.get("head_dim") or config.embed // config.heads
    config.validate()
    return config


def decoder_json(c: DecoderConfig, dtype):
    return {
        "architectures": [CLASSES[c.model_type]],
        "model_type": c.model_type,
        "hidden_act": "silu",
        "head_dim": c.head_dim,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **{theirs: getattr(c, ours) for theirs, ours in FIELDS.items() if theirs in DEFAULTS[c.model_type]},
    }


def is_llama(directory):
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in DEFAULTS


def read(directory, dtype=None):
    """(DecoderConfig, {"decoder/...": Lazy}) of a Llama or Mistral directory.

    Raises:
      CheckpointError: it is no such directory, a setting is not supported, or tensors do not fit (all are listed).
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no Mistral or Llama model, there is no config.json")
    hf = read_json(file)
    config = decoder_config(hf, file)
    tensors = untied(open_tensors(directory), hf)
    shapes = shapes_of(ModelConfig(decoder=config), "decoder")
    return config, from_foreign(tensors, table(config), shapes, directory, ignore=IGNORED, dtype=dtype)
