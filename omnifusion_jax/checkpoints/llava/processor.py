"""What a Hugging Face processor does before a LLaVA model.

It holds the chat template, how many tokens a picture takes, and how the pixels of a picture are prepared.
"""

from pathlib import Path

from omnifusion_jax.checkpoints.encoders.hugging_face import apply_view, preprocessor_json
from omnifusion_jax.checkpoints.storage.settings import read_json, require
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.errors import CheckpointError

PICTURES, PROCESSOR, TEMPLATE = "preprocessor_config.json", "processor_config.json", "chat_template.jinja"
# The first of these files that has a template decides
TEMPLATE_FILES = (TEMPLATE, "chat_template.json", PROCESSOR, "tokenizer_config.json")
KINDS = {  # whether pictures are cut into tiles: the image processors whose work ours can do
    False: ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor"),
    True: ("LlavaNextImageProcessor",),
}


def read_template(directory: str | Path) -> str:
    """The chat template of a directory.

    Raises:
      CheckpointError: there is none.
    """
    for file in (Path(directory) / name for name in TEMPLATE_FILES):
        if file.suffix == ".jinja" and file.is_file():
            return file.read_text(encoding="utf-8")
        found = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(found, list):  # several templates, each with a name
            found = {entry["name"]: entry["template"] for entry in found}
        if isinstance(found, dict):
            found = found.get("default")
        if found:
            return found
    raise CheckpointError(
        f"{directory}: no chat template, which says how its prompts are laid out (model.template); "
        f"looked into {', '.join(TEMPLATE_FILES)}. Write one to {directory}/{TEMPLATE}; "
        "omnifusion_jax/published_templates.py has those of LLaVA-1.5 and LLaVA-NeXT"
    )


def read_settings(directory: str | Path) -> tuple[dict, dict]:
    """(the processor's own settings, those of its image processor).

    Raises:
      CheckpointError: no file has the settings of the image processor.
    """
    processor, pictures = (
        read_json(file) if file.is_file() else {}
        for file in (Path(directory) / PROCESSOR, Path(directory) / PICTURES)
    )
    pictures = processor.get("image_processor") or pictures
    if not pictures:
        raise CheckpointError(
            f"{directory}: neither {PICTURES} nor {PROCESSOR} says how pictures are prepared; "
            "add the file of the original"
        )
    return processor, pictures


def apply_pictures(config: ModelConfig, pictures: dict, where: str):
    """Sets in `config` how pictures are prepared: fit, mean, standard deviation, shortest edge before a crop.

    Raises:
      CheckpointError: this library cannot prepare pictures in that way.
    """
    encoder, tiles = config.image.encoders[0], tiled(config)
    kind = pictures.get("image_processor_type") or pictures.get("feature_extractor_type") or KINDS[tiles][0]
    kind = kind.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    require({"image_processor_type": kind}, {"image_processor_type": KINDS[tiles]}, where)
    trained_for, fit = encoder.image_size, apply_view(encoder, pictures, where)
    if encoder.image_size != trained_for or (tiles and encoder.shortest_edge):
        size, edge = encoder.view
        raise CheckpointError(
            f"{where}: pictures come to {edge} and then {size} pixels, "
            f"the vision tower takes {trained_for} a side"
        )
    if tiles:
        fit = "tiles"
    elif kind == "LlavaImageProcessor" and pictures.get("do_pad", False):
        fit = "pad"
    config.image.fit = fit


def tiled(config: ModelConfig) -> bool:
    return config.image.fit == "tiles"


def check_count(config: ModelConfig, processor: dict, where: str):
    """Compares the processor's number of tokens per picture with the feature rows of the vision tower.

    Raises:
      CheckpointError: they differ.
    """
    patch = processor.get("patch_size")
    if not patch:
        return
    strategy = processor.get("vision_feature_select_strategy") or strategy_of(config)
    extra = processor.get("num_additional_image_tokens", int(config.image.encoders[0].class_token))
    count = (config.image.encoders[0].image_size // patch) ** 2 + extra - (strategy == "default")
    if count != config.image.encoders[0].rows:
        raise CheckpointError(
            f"{where}: patch_size {patch}, num_additional_image_tokens {extra} and "
            f"vision_feature_select_strategy {strategy!r} make {count} tokens a picture, "
            f"the vision tower of config.json gives {config.image.encoders[0].rows}. "
            "Correct the one that is wrong"
        )


def strategy_of(config: ModelConfig) -> str:
    """vision_feature_select_strategy: "default" drops the class token's feature row, "full" drops no row."""
    encoder = config.image.encoders[0]
    drops_class_token = encoder.class_token and not encoder.keep_class_token
    return "default" if drops_class_token else "full"


def pictures_json(config: ModelConfig) -> dict:
    """The preprocessor_config.json that `apply_pictures` reads as `config`."""
    fit = config.image.fit
    more = {
        "pad": {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
        "tiles": {
            "image_processor_type": "LlavaNextImageProcessor",
            "do_pad": True,
            "image_grid_pinpoints": pinpoints(config),
        },
    }
    common = preprocessor_json(config.image.encoders[0], "squash" if fit == "squash" else "crop")
    return common | more.get(fit, {})


def pinpoints(config: ModelConfig) -> list[list[int]]:
    """`image.grids` in pixels, as image_grid_pinpoints has them."""
    return [[n * config.image.encoders[0].image_size for n in grid] for grid in config.image.grids]


def processor_json(config: ModelConfig) -> dict:
    """The processor_config.json that `check_count` accepts for `config`."""
    return {
        "processor_class": "LlavaNextProcessor" if tiled(config) else "LlavaProcessor",
        "image_token": config.image.token,
        "patch_size": config.image.encoders[0].patch,
        "num_additional_image_tokens": int(config.image.encoders[0].class_token),
        "vision_feature_select_strategy": strategy_of(config),
    }
