"""Reads the config.json of a LLaVA into a ModelConfig, and writes one."""

from pathlib import Path

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders.hugging_face import HuggingFace
from omnifusion_jax.checkpoints.llava import processor
from omnifusion_jax.checkpoints.llava.tables import TOWERS, tower_of
from omnifusion_jax.checkpoints.storage.settings import require, section
from omnifusion_jax.config import ImageConfig, ModelConfig, adapter
from omnifusion_jax.errors import CheckpointError

CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}

DEFAULT_TOWER = {  # the vision tower if config.json does not describe one: the default of transformers
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 336, "patch_size": 14,
}  # fmt: skip

# image_grid_pinpoints if config.json has none: the default of transformers
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

ONLY = {  # the values of these settings with which ours computes the same
    "vision_feature_select_strategy": ("default", "full"),
    "multimodal_projector_bias": (True,),
    "use_image_newline_parameter": (True,),
}

PROJECTORS = {  # projector_hidden_act: the adapter
    "gelu": {"kind": "mlp", "activation": "gelu"},
    "gelu_pytorch_tanh": {"kind": "mlp", "activation": "gelu_tanh"},
    "linear": {"kind": "linear"},
}


def model_config(hf: dict, directory: Path) -> tuple[ModelConfig, HuggingFace]:
    """(config, family of the vision tower) from `hf`, the content of config.json, and the processor's files.

    Settings that only the tensors can tell keep their defaults.

    Raises:
      CheckpointError: a setting is not supported, a file is missing, or files contradict each other.
    """
    where, tiles = directory / "config.json", hf["model_type"] == "llava_next"
    require(hf, ONLY, where)
    activation = hf.get("projector_hidden_act", "gelu")
    require({"projector_hidden_act": activation}, {"projector_hidden_act": tuple(PROJECTORS)}, where)
    layer, strategy = hf.get("vision_feature_layer", -2), hf.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        raise CheckpointError(
            f"{where}: vision_feature_layer is {layer}: "
            "features of several layers side by side are not supported, one number is"
        )
    vision = {"model_type": "clip_vision_model", **(section(hf, "vision_config", where) or DEFAULT_TOWER)}
    families = {family.model_types[-1]: family for family in TOWERS}
    require(vision, {"model_type": tuple(families)}, f"{where}, vision_config")
    family = families[vision["model_type"]]
    encoder = family.encoder_config(vision, None, f"{where}, vision_config")
    if strategy == "default" and not encoder.class_token:
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy 'default' leaves out a patch "
            "where there is no class token; 'full' does not"
        )
    encoder.feature_layer = layer
    encoder.keep_class_token = strategy == "full" and encoder.class_token
    settings, pictures = processor.read_settings(directory)
    text = section(hf, "text_config", where)
    tied = bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    joins = adapter(**PROJECTORS[activation])
    text = {"model_type": "llama", **text, "tie_word_embeddings": tied}
    decoder = language_models.decoder_config(text, f"{where}, text_config")
    tiling = tile_settings(hf, pictures, encoder.image_size, directory) if tiles else {}
    config = ModelConfig(
        preset=hf["model_type"],
        filled_from=hf["model_type"],
        decoder=decoder,
        image=ImageConfig((encoder,), joins, token=settings.get("image_token") or "<image>", **tiling),
        layout="template",
        prompt="",
        template=processor.read_template(directory),
    )
    if tiles and encoder.keep_class_token:
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy 'full' puts the class token into the grid of tiles; "
            "supported is 'default'"
        )
    processor.apply_pictures(config, pictures, f"{directory}, {processor.PICTURES}")
    processor.check_count(config, settings, f"{directory}/{processor.PROCESSOR}")
    return config, family


def tile_settings(hf: dict, pictures: dict, size: int, directory: Path) -> dict:
    """The fields of ImageConfig that say how pictures are cut into tiles of `size` pixels a side."""
    found = hf.get("image_grid_pinpoints") or PINPOINTS
    theirs = pictures.get("image_grid_pinpoints", found)
    if theirs != found:
        raise CheckpointError(
            f"{directory}: image_grid_pinpoints are {found} in config.json, {theirs} in {processor.PICTURES}"
        )
    if any(n % size for grid in found for n in grid):
        raise CheckpointError(
            f"{directory}/config.json: image_grid_pinpoints {found} are not multiples "
            f"of the vision tower's {size} pixels"
        )
    return {
        "fit": "tiles",
        "grids": tuple(tuple(n // size for n in grid) for grid in found),
        "unpad": True,
        "newline": True,
    }


def config_json(c: ModelConfig, dtype: str, image: int, tokenizer) -> dict:
    """The config.json that `model_config` reads as `c`.

    `image` is the id of the image token, `tokenizer` a data.tokenizer.Tokenizer.
    """
    kind = "llava_next" if c.image.fit == "tiles" else "llava"
    encoder, joins = c.image.encoders[0], vars(c.image.adapter).items()
    activation = next(name for name, ours in PROJECTORS.items() if ours.items() <= joins)
    found = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "image_token_index": image,
        "image_seq_length": c.image.rows,
        "projector_hidden_act": activation,
        "multimodal_projector_bias": True,
        "vision_feature_layer": encoder.feature_layer,
        "vision_feature_select_strategy": processor.strategy_of(c),
        "tie_word_embeddings": c.decoder.tied,
        "torch_dtype": dtype,
        "text_config": language_models.decoder_json(c.decoder, dtype, tokenizer.ends),
        "vision_config": tower_of(encoder).encoder_json(encoder, dtype),
    }
    if kind == "llava_next":
        found |= {"image_grid_pinpoints": processor.pinpoints(c), "use_image_newline_parameter": True}
    return found
