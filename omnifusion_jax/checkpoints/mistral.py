"""Hugging Face `MistralForCausalLM`: tensor names and config.json."""

from pathlib import Path

from omnifusion_jax.checkpoints.engine import MATRIX, SAME, from_foreign, shapes_of, split_in, split_out
from omnifusion_jax.checkpoints.files import open_tensors, read_json, require
from omnifusion_jax.config import DecoderConfig, ModelConfig
from omnifusion_jax.errors import CheckpointError

IGNORED = (r".*\.rotary_emb\.inv_freq",)

FIELDS = {  # theirs: ours, and transformers' default for a file that leaves it out
    "vocab_size": ("vocab", 32000),
    "hidden_size": ("embed", 4096),
    "intermediate_size": ("mlp", 14336),
    "num_hidden_layers": ("layers", 32),
    "num_attention_heads": ("heads", 32),
    "num_key_value_heads": ("kv_heads", 8),
    "max_position_embeddings": ("max_length", 131072),
    "rms_norm_eps": ("eps", 1e-6),
    "sliding_window": ("window", 4096),
}
ONLY = {  # settings with which our decoder computes something else
    "model_type": ("mistral",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
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


def untied(tensors, hf):
    """The tensors with a head of their own: a copy of the embeddings where config.json ties them."""
    if not hf.get("tie_word_embeddings") or "lm_head.weight" in tensors or "model.embed_tokens.weight" not in tensors:
        return tensors
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}


def decoder_config(hf, where="config.json") -> DecoderConfig:
    """From the config.json of a `MistralForCausalLM`, of transformers 4 or 5.

    Raises:
      CheckpointError: a setting our decoder does not have.
    """
    require(hf, ONLY, where)
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}  # transformers 4, 5
    require({"rope scaling": rope.get("rope_type", rope.get("type", "default"))}, {"rope scaling": ("default",)}, where)
    config = DecoderConfig(
        model_type=hf.get("model_type", "mistral"), **{ours: hf.get(theirs, default) for theirs, (ours, default) in FIELDS.items()}
    )
    config.rope_theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    config.head_dim = hf.get("head_dim") or config.embed // config.heads
    config.validate()
    return config


def decoder_json(c: DecoderConfig, dtype):
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "head_dim": c.head_dim,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **{theirs: getattr(c, ours) for theirs, (ours, _) in FIELDS.items()},
    }


def read(directory, dtype=None):
    """(DecoderConfig, {"decoder/...": Lazy}) of a Mistral directory.

    Raises:
      CheckpointError: it is no Mistral directory, a setting is not supported, or tensors do not fit (all are listed).
    """
    file = Path(directory) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{directory}: no Mistral model, there is no config.json")
    hf = read_json(file)
    config = decoder_config(hf, file)
    tensors = untied(open_tensors(directory), hf)
    shapes = shapes_of(ModelConfig(decoder=config), "decoder")
    return config, from_foreign(tensors, table(config), shapes, directory, ignore=IGNORED, dtype=dtype)
