"""The vision tower of a Hugging Face CLIP checkpoint: tensor names, config.json, preprocessor_config.json."""

from pathlib import Path

from omnifusion_jax.checkpoints.engine import MATRIX, SAME, Transform, encoder_shapes, from_foreign, split, split_in, split_out
from omnifusion_jax.checkpoints.files import open_tensors, read_json, require
from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.vit import ACTIVATIONS

PREFIX = "vision_model."  # public files have it; transformers 5 drops it in memory
MODEL_TYPES = ("clip", "clip_vision_model")
IGNORED = (r"(vision_model\.)?embeddings\.position_ids", r"text_model\..*", r"(text|visual)_projection\.weight", r"logit_scale")

CONVOLUTION = Transform(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # [out, 3, p, p] <-> [p, p, 3, out]

FIELDS = {  # theirs: ours, and transformers' default for a file that leaves it out
    "hidden_size": ("embed", 768),
    "intermediate_size": ("mlp", 3072),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "image_size": ("image_size", 224),
    "patch_size": ("patch", 32),
    "hidden_act": ("activation", "quick_gelu"),
    "layer_norm_eps": ("eps", 1e-5),
}
BICUBIC = 3  # Pillow's number


def table(c: EncoderConfig, path="encoders/0"):
    """Names of `CLIPVisionModel`, with the `vision_model.` of public files."""
    heads = c.heads, c.embed // c.heads
    layer, ours = PREFIX + "encoder.layers.{}.", path + "/layers/"
    rows = {
        PREFIX + "embeddings.class_embedding": (f"{path}/class_token", SAME),
        PREFIX + "embeddings.patch_embedding.weight": (f"{path}/patch", CONVOLUTION),
        PREFIX + "embeddings.position_embedding.weight": (f"{path}/position", SAME),
        PREFIX + "pre_layrnorm.weight": (f"{path}/pre_norm/scale", SAME),
        PREFIX + "pre_layrnorm.bias": (f"{path}/pre_norm/bias", SAME),
        PREFIX + "post_layernorm.weight": (f"{path}/post_norm/scale", SAME),
        PREFIX + "post_layernorm.bias": (f"{path}/post_norm/bias", SAME),
        layer + "self_attn.out_proj.weight": (ours + "attention/out", split_in(*heads)),
        layer + "self_attn.out_proj.bias": (ours + "attention/out_bias", SAME),
        layer + "mlp.fc1.weight": (ours + "up", MATRIX),
        layer + "mlp.fc1.bias": (ours + "up_bias", SAME),
        layer + "mlp.fc2.weight": (ours + "down", MATRIX),
        layer + "mlp.fc2.bias": (ours + "down_bias", SAME),
    }
    for theirs, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        rows[f"{layer}self_attn.{theirs}.weight"] = (f"{ours}attention/{name}", split_out(*heads))
        rows[f"{layer}self_attn.{theirs}.bias"] = (f"{ours}attention/{name}_bias", split(*heads))
    for n in (1, 2):
        rows[f"{layer}layer_norm{n}.weight"] = (f"{ours}norm{n}/scale", SAME)
        rows[f"{layer}layer_norm{n}.bias"] = (f"{ours}norm{n}/bias", SAME)
    return rows


def encoder_config(hf, preprocessor=None, where="config.json") -> EncoderConfig:
    """From the config.json of a `CLIPModel` or `CLIPVisionModel`, and its preprocessor_config.json where there is one.

    Raises:
      CheckpointError: a setting our vision tower or our preprocessing does not have.
    """
    require(hf, {"model_type": MODEL_TYPES}, where)
    vision = {**hf["vision_config"], **(hf.get("vision_config_dict") or {})} if "vision_config" in hf else hf
    require(vision, {"hidden_act": tuple(ACTIVATIONS), "num_channels": (3,), "quantization_config": (None,)}, where)
    config = EncoderConfig(**{ours: vision.get(theirs, default) for theirs, (ours, default) in FIELDS.items()})
    if preprocessor:
        size = config.image_size
        sizes = (size, {"height": size, "width": size}, {"shortest_edge": size})
        yes = (True,)
        allowed = {"crop_size": sizes, "size": sizes, "do_resize": yes, "do_center_crop": yes, "do_normalize": yes, "resample": (BICUBIC,)}
        require(preprocessor, allowed, f"{where} (model) and preprocessor_config.json")
        config.mean, config.std = tuple(preprocessor.get("image_mean", config.mean)), tuple(preprocessor.get("image_std", config.std))
    config.validate()
    return config


def encoder_json(c: EncoderConfig, dtype):
    """The config.json of a `CLIPVisionModel`."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "num_channels": 3,
        "torch_dtype": dtype,
        **{theirs: getattr(c, ours) for theirs, (ours, _) in FIELDS.items()},
    }


def preprocessor_json(c: EncoderConfig):
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": c.image_size},
        "resample": BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": c.image_size, "width": c.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(c.mean),
        "image_std": list(c.std),
    }


def is_clip(directory):
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in MODEL_TYPES


def read(directory, dtype=None, path="encoders/0"):
    """(EncoderConfig, {path: Lazy}) of a CLIP directory.

    Raises:
      CheckpointError: it is no CLIP directory, a setting is not supported, or tensors do not fit (all are listed).
    """
    directory = Path(directory)
    if not is_clip(directory):
        raise CheckpointError(f"{directory}: no CLIP model, whose config.json has model_type {' or '.join(MODEL_TYPES)}")
    preprocessor = directory / "preprocessor_config.json"
    config = encoder_config(
        read_json(directory / "config.json"),
        read_json(preprocessor) if preprocessor.is_file() else None,
        directory / "config.json",
    )
    shapes = {f"{path}/{name}": shape for name, shape in encoder_shapes(config).items()}
    tensors = open_tensors(directory)
    return config, from_foreign(tensors, table(config, path), shapes, directory, ignore=IGNORED, prefix=PREFIX, dtype=dtype)
