"""What a Hugging Face processor does before a LLaVA model: the chat template, how many tokens a picture takes, and how its pixels are prepared."""

import math
from pathlib import Path

from omnifusion_jax.checkpoints.files import read_json, require
from omnifusion_jax.checkpoints.huggingface import BICUBIC, preprocessor_json
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.errors import CheckpointError

PICTURES, PROCESSOR, TEMPLATE = "preprocessor_config.json", "processor_config.json", "chat_template.jinja"
TEMPLATE_FILES = (TEMPLATE, "chat_template.json", PROCESSOR, "tokenizer_config.json")  # the first that has a template decides
CROPPING, SQUASHING, TILING = ("CLIPImageProcessor", "LlavaImageProcessor"), ("SiglipImageProcessor",), ("LlavaNextImageProcessor",)
ALWAYS = {"do_resize": (True,), "do_rescale": (True,), "do_normalize": (True,), "resample": (BICUBIC,)}


def read_template(directory) -> str:
    """The chat template of a directory. Raises CheckpointError where there is none."""
    for file in (Path(directory) / name for name in TEMPLATE_FILES):
        if file.suffix == ".jinja" and file.is_file():
            return file.read_text(encoding="utf-8")
        found = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(found, list):  # several, by name
            found = {entry["name"]: entry["template"] for entry in found}
        if found := found.get("default") if isinstance(found, dict) else found:
            return found
    raise CheckpointError(
        f"{directory}: no chat template, which says how its prompts are laid out (model.template); looked into {', '.join(TEMPLATE_FILES)}. "
        f"Write one to {directory}/{TEMPLATE}; omnifusion_jax/templates.py has those of LLaVA-1.5 and LLaVA-NeXT"
    )


def read_settings(directory) -> tuple[dict, dict]:
    """(the processor's own settings, those of its image processor). Raises CheckpointError where the latter are nowhere."""
    processor, pictures = (read_json(file) if file.is_file() else {} for file in (Path(directory) / PROCESSOR, Path(directory) / PICTURES))
    pictures = processor.get("image_processor") or pictures
    if not pictures:
        raise CheckpointError(f"{directory}: neither {PICTURES} nor {PROCESSOR} says how pictures are prepared; add the file of the original")
    return processor, pictures


def apply_pictures(config: ModelConfig, pictures, where):
    """Sets how pictures are prepared: fit, mean, standard deviation, the shortest edge before a crop.

    Raises:
      CheckpointError: they are prepared as ours cannot.
    """
    encoder, size, tiles = config.encoder, config.encoder.image_size, tiled(config)
    kind = pictures.get("image_processor_type") or pictures.get("feature_extractor_type") or (TILING if tiles else CROPPING)[0]
    kind = kind.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    require({"image_processor_type": kind}, {"image_processor_type": TILING if tiles else (*CROPPING, *SQUASHING)}, where)
    require(pictures, ALWAYS, where)
    if not math.isclose(pictures.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise CheckpointError(f"{where}: rescale_factor is {pictures['rescale_factor']}, supported is 1/255")
    edge, square = sides(pictures.get("size", 224), "size", where)
    crop = edge if kind in SQUASHING else sides(pictures.get("crop_size", 224), "crop_size", where)[0]
    cut = kind in SQUASHING or pictures.get("do_center_crop", True)
    if not cut or crop != size or edge < size or (tiles and edge != size):
        how = f"scaled to {edge} pixels and {'cut to' if cut else 'not cut,'} {crop}"
        raise CheckpointError(f"{where}: pictures are {how}, the vision tower takes {size} x {size}")
    padded = kind == "LlavaImageProcessor" and pictures.get("do_pad", False)
    config.image.fit = "tiles" if tiles else "pad" if padded else "squash" if square or kind in SQUASHING else "crop"
    encoder.shortest_edge = None if edge == size else edge
    encoder.mean, encoder.std = (tuple(pictures.get(f"image_{name}", default)) for name, default in (("mean", encoder.mean), ("std", encoder.std)))


def tiled(config):
    return config.image.fit == "tiles"


def sides(value, name, where):
    """(pixels a side, whether height and width are said, not the shortest edge) of 336, {"shortest_edge": 336} or {"height": 336, "width": 336}."""
    found = {n for n in value.values() if n} if isinstance(value, dict) else {value}
    if len(found) != 1:
        raise CheckpointError(f"{where}: {name} is {value}, no square")
    return found.pop(), isinstance(value, dict) and bool(value.get("height"))


def check_count(config: ModelConfig, processor, where):
    """Raises CheckpointError where the processor counts other tokens a picture than the vision tower gives."""
    if not (patch := processor.get("patch_size")):
        return
    strategy = processor.get("vision_feature_select_strategy") or strategy_of(config)
    extra = processor.get("num_additional_image_tokens", int(config.encoder.class_token))
    count = (config.encoder.image_size // patch) ** 2 + extra - (strategy == "default")
    if count != config.encoder.rows:
        raise CheckpointError(
            f"{where}: patch_size {patch}, num_additional_image_tokens {extra} and vision_feature_select_strategy {strategy!r} make {count} tokens "
            f"a picture, the vision tower of config.json gives {config.encoder.rows}. Correct the one that is wrong"
        )


def strategy_of(config):
    return "full" if config.encoder.keep_class_token else "default"


def pictures_json(config: ModelConfig):
    """The preprocessor_config.json that `apply_pictures` reads as `config`."""
    encoder, fit = config.encoder, config.image.fit
    edge = encoder.shortest_edge or encoder.image_size
    more = {
        "crop": {"size": {"shortest_edge": edge}},
        "squash": {"size": {"height": edge, "width": edge}},
        "pad": {"size": {"shortest_edge": edge}, "image_processor_type": "LlavaImageProcessor", "do_pad": True},
        "tiles": {"image_processor_type": "LlavaNextImageProcessor", "do_pad": True, "image_grid_pinpoints": pinpoints(config)},
    }
    return preprocessor_json(encoder) | more[fit]


def pinpoints(config):
    """`image.grids` in pixels."""
    return [[n * config.encoder.image_size for n in grid] for grid in config.image.grids]


def processor_json(config: ModelConfig):
    return {
        "processor_class": "LlavaNextProcessor" if tiled(config) else "LlavaProcessor",
        "image_token": config.image_token,
        "patch_size": config.encoder.patch,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": strategy_of(config),
    }
