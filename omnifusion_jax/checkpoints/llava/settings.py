"""config.json of a LLaVA, and the ModelConfig that it says."""

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders.hugging_face import HuggingFace
from omnifusion_jax.checkpoints.llava import processor
from omnifusion_jax.checkpoints.llava.tables import TOWERS, tower_of
from omnifusion_jax.checkpoints.storage.settings import require
from omnifusion_jax.config import ImageConfig, ModelConfig, adapter
from omnifusion_jax.errors import CheckpointError

CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}

UNSAID = {  # the vision tower of a config.json that describes none
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

ONLY = {  # settings with which ours computes something else
    "vision_feature_select_strategy": ("default", "full"),
    "multimodal_projector_bias": (True,),
    "use_image_newline_parameter": (True,),
    "quantization_config": (None,),
}

PROJECTORS = {  # projector_hidden_act: the adapter
    "gelu": {"kind": "mlp", "activation": "gelu"},
    "gelu_pytorch_tanh": {"kind": "mlp", "activation": "gelu_tanh"},
    "linear": {"kind": "linear"},
}


def model_config(hf, directory) -> tuple[ModelConfig, HuggingFace]:
    """(config, family of the vision tower) from config.json and the processor's files.

    Whatever needs the tensors is left as it is by default.
    """
    where, tiles = directory / "config.json", hf["model_type"] == "llava_next"
    require(hf, ONLY, where)
    require(
        {"projector_hidden_act": hf.get("projector_hidden_act", "gelu")},
        {"projector_hidden_act": tuple(PROJECTORS)},
        where,
    )
    layer, strategy = hf.get("vision_feature_layer", -2), hf.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        raise CheckpointError(
            f"{where}: vision_feature_layer is {layer}: features of several layers side by side are not supported, one number is"
        )
    vision = {"model_type": "clip_vision_model", **(hf.get("vision_config") or UNSAID)}
    families = {family.model_types[-1]: family for family in TOWERS}
    require(vision, {"model_type": tuple(families)}, f"{where}, vision_config")
    family = families[vision["model_type"]]
    encoder = family.encoder_config(vision, None, f"{where}, vision_config")
    if strategy == "default" and not encoder.class_token:
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy 'default' leaves out a patch where there is no class token; 'full' does not"
        )
    encoder.feature_layer, encoder.keep_class_token = layer, strategy == "full" and encoder.class_token
    settings, pictures = processor.read_settings(directory)
    text = hf.get("text_config") or {}
    tied = bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    joins = adapter(**PROJECTORS[hf.get("projector_hidden_act", "gelu")])
    config = ModelConfig(
        preset=hf["model_type"],
        filled_from=hf["model_type"],
        decoder=language_models.decoder_config(
            {"model_type": "llama", **text, "tie_word_embeddings": tied}, f"{where}, text_config"
        ),
        image=ImageConfig(
            (encoder,), joins, **(tile_settings(hf, pictures, encoder.image_size, directory) if tiles else {})
        ),
        layout="template",
        prompt="",
        template=processor.read_template(directory),
        image_token=settings.get("image_token") or "<image>",
    )
    if tiles and encoder.keep_class_token:
        raise CheckpointError(
            f"{where}: vision_feature_select_strategy 'full' puts the class token into the grid of tiles; supported is 'default'"
        )
    processor.apply_pictures(config, pictures, f"{directory}, {processor.PICTURES}")
    processor.check_count(config, settings, f"{directory}/{processor.PROCESSOR}")
    return config, family


def tile_settings(hf, pictures, size, directory):
    found = hf.get("image_grid_pinpoints") or PINPOINTS
    if (theirs := pictures.get("image_grid_pinpoints", found)) != found:
        raise CheckpointError(
            f"{directory}: image_grid_pinpoints are {found} in config.json, {theirs} in {processor.PICTURES}"
        )
    if any(n % size for grid in found for n in grid):
        raise CheckpointError(
            f"{directory}/config.json: image_grid_pinpoints {found} are not multiples of the vision tower's {size} pixels"
        )
    return {
        "fit": "tiles",
        "grids": tuple(tuple(n // size for n in grid) for grid in found),
        "unpad": True,
        "newline": True,
    }


def config_json(c: ModelConfig, dtype, image, tokenizer):
    """The config.json that `model_config` reads as `c`; `image` is the id of the image token, `tokenizer` a data.tokenizer.Tokenizer."""
    kind = "llava_next" if c.image.fit == "tiles" else "llava"
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "image_token_index": image,
        "image_seq_length": c.image.rows,
        "projector_hidden_act": next(
            name for name, ours in PROJECTORS.items() if ours.items() <= vars(c.image.adapter).items()
        ),
        "multimodal_projector_bias": True,
        "vision_feature_layer": c.image.encoders[0].feature_layer,
        "vision_feature_select_strategy": processor.strategy_of(c),
        "tie_word_embeddings": c.decoder.tied,
        "torch_dtype": dtype,
        "text_config": language_models.decoder_json(c.decoder, dtype, tokenizer.ends),
        "vision_config": tower_of(c.image.encoders[0]).encoder_json(c.image.encoders[0], dtype),
        **(
            {"image_grid_pinpoints": processor.pinpoints(c), "use_image_newline_parameter": True}
            if kind == "llava_next"
            else {}
        ),
    }
