"""LLaVA and LLaVA-NeXT as Hugging Face has them: `LlavaForConditionalGeneration`, `LlavaNextForConditionalGeneration`."""

import dataclasses
import re
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints import clip, decoders, processor
from omnifusion_jax.checkpoints.clip import CLIP
from omnifusion_jax.checkpoints.engine import MATRIX, SAME, from_foreign, shapes_of
from omnifusion_jax.checkpoints.files import open_tensors, read_json, require
from omnifusion_jax.checkpoints.siglip import SIGLIP
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer, special_id, token_id
from omnifusion_jax.config import AdapterConfig, EncoderConfig, ImageConfig, ModelConfig, adapter
from omnifusion_jax.errors import CheckpointError

CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
TOWERS = (CLIP, SIGLIP)  # families of checkpoints/encoders.py that the classes take and whose names are under TOWER below
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
TOWER, LANGUAGE, PROJECTOR, NEWLINE = "vision_tower.", "language_model.", "multi_modal_projector.", "image_newline"
FORMS = (  # names that transformers 5 has in memory, and has written without the tower's own prefix: as public files have them
    (r"lm_head\.", LANGUAGE + "lm_head."),
    (r"model\.language_model\.", LANGUAGE + "model."),
    (r"model\.(?=vision_tower\.|multi_modal_projector\.|image_newline$)", ""),
    (r"vision_tower\.(?!vision_model\.)", TOWER + clip.PREFIX),
)
IGNORED = (*(re.escape(TOWER) + f"(?:{name})" for name in SIGLIP.ignored), *decoders.IGNORED)


def projector_table(c: AdapterConfig):
    first, second = PROJECTOR + "linear_1.", PROJECTOR + "linear_2."
    if c.kind == "linear":  # linear_2 is an identity there
        return {first + "weight": ("image/adapter/linear/kernel", MATRIX), first + "bias": ("image/adapter/linear/bias", SAME)}
    return {
        first + "weight": ("image/adapter/up/kernel", MATRIX),
        first + "bias": ("image/adapter/up/bias", SAME),
        second + "weight": ("image/adapter/linear/kernel", MATRIX),
        second + "bias": ("image/adapter/linear/bias", SAME),
    }


def obstacles(c: EncoderConfig):
    """Why each of TOWERS cannot be `c`, in their order; "" where it can."""
    alone = dataclasses.replace(c, shortest_edge=None)  # what comes before the tower is the processor's affair
    return [family.obstacles(alone) for family in TOWERS]


def tower(c: EncoderConfig):
    """The family that computes `c`, which there must be."""
    return TOWERS[obstacles(c).index("")]


def table(c: ModelConfig):
    """Everything that such a checkpoint holds, under the names of public files."""
    rows = {TOWER + name: row for name, row in tower(c.image.encoders[0]).table(c.image.encoders[0]).items()}
    rows |= projector_table(c.image.adapter)
    rows |= {NEWLINE: ("special/newline", SAME)} if c.image.newline else {}
    return rows | {LANGUAGE + name: row for name, row in decoders.table(c.decoder).items()}


def is_llava(directory):
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in CLASSES


def read(directory, dtype=None):
    """(ModelConfig, {path: Lazy}, tokenizer directory). The prompt is laid out as the directory's own chat template says.

    Raises:
      CheckpointError: a file is missing, a setting is not supported, files contradict each other, or tensors do not fit (all are listed).
    """
    directory = Path(directory)
    hf = read_json(directory / "config.json")
    tensors = public_names(open_tensors(directory), directory)
    config = model_config(hf, directory)
    if config.image.adapter.kind == "linear":
        tensors = without_identity(tensors, directory)
    elif (name := PROJECTOR + "linear_1.bias") in tensors:
        config.image.adapter.mlp = len(tensors[name])
    config.validate()
    tensors = decoders.without_copy(tensors, config.decoder, directory, LANGUAGE)
    arrays = from_foreign(tensors, table(config), shapes_of(config), directory, ignore=IGNORED, dtype=dtype)
    return config, arrays, tokenizer_of(directory, config, hf)


def public_names(tensors, where):
    """The tensors under the names of public files."""
    found = {}
    for name, a in tensors.items():
        public = name
        for pattern, prefix in FORMS:
            public = re.sub("^" + pattern, prefix, public)
        if public in found:
            raise CheckpointError(f"{where}: {name} stands there under another name too, {public}. Remove one of them")
        found[public] = a
    return found


def model_config(hf, directory) -> ModelConfig:
    """From config.json and the processor's files; whatever needs the tensors is left as it is by default."""
    where, tiles = directory / "config.json", hf["model_type"] == "llava_next"
    require(hf, ONLY, where)
    require({"projector_hidden_act": hf.get("projector_hidden_act", "gelu")}, {"projector_hidden_act": tuple(PROJECTORS)}, where)
    layer, strategy = hf.get("vision_feature_layer", -2), hf.get("vision_feature_select_strategy", "default")
    if not isinstance(layer, int):
        raise CheckpointError(f"{where}: vision_feature_layer is {layer}: features of several layers side by side are not supported, one number is")
    vision = {"model_type": "clip_vision_model", **(hf.get("vision_config") or UNSAID)}
    families = {family.model_types[-1]: family for family in TOWERS}
    require(vision, {"model_type": tuple(families)}, f"{where}, vision_config")
    encoder = families[vision["model_type"]].encoder_config(vision, None, f"{where}, vision_config")
    if strategy == "default" and not encoder.class_token:
        raise CheckpointError(f"{where}: vision_feature_select_strategy 'default' leaves out a patch where there is no class token; 'full' does not")
    encoder.feature_layer, encoder.keep_class_token = layer, strategy == "full" and encoder.class_token
    settings, pictures = processor.read_settings(directory)
    text = hf.get("text_config") or {}
    tied = bool(hf.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    joins = adapter(**PROJECTORS[hf.get("projector_hidden_act", "gelu")])
    config = ModelConfig(
        preset=hf["model_type"],
        filled_from=hf["model_type"],
        decoder=decoders.decoder_config({"model_type": "llama", **text, "tie_word_embeddings": tied}, f"{where}, text_config"),
        image=ImageConfig((encoder,), joins, **(tile_settings(hf, pictures, encoder.image_size, directory) if tiles else {})),
        layout="template",
        prompt="",
        template=processor.read_template(directory),
        image_token=settings.get("image_token") or "<image>",
    )
    if tiles and encoder.keep_class_token:
        raise CheckpointError(f"{where}: vision_feature_select_strategy 'full' puts the class token into the grid of tiles; supported is 'default'")
    processor.apply_pictures(config, pictures, f"{directory}, {processor.PICTURES}")
    processor.check_count(config, settings, f"{directory}/{processor.PROCESSOR}")
    return config


def tile_settings(hf, pictures, size, directory):
    found = hf.get("image_grid_pinpoints") or PINPOINTS
    if (theirs := pictures.get("image_grid_pinpoints", found)) != found:
        raise CheckpointError(f"{directory}: image_grid_pinpoints are {found} in config.json, {theirs} in {processor.PICTURES}")
    if any(n % size for grid in found for n in grid):
        raise CheckpointError(f"{directory}/config.json: image_grid_pinpoints {found} are not multiples of the vision tower's {size} pixels")
    return {"fit": "tiles", "grids": tuple(tuple(n // size for n in grid) for grid in found), "unpad": True, "newline": True}


def without_identity(tensors, where):
    """The tensors without the projector's second layer, which is an identity where there is no activation before it."""
    weight, bias = (tensors.get(f"{PROJECTOR}linear_2.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None:
        raise CheckpointError(f"{where}: {PROJECTOR}linear_2.weight or .bias is missing")
    if bias.any() or not np.array_equal(weight, np.eye(*weight.shape, dtype=weight.dtype)):
        raise CheckpointError(f"{where}: projector_hidden_act 'linear' is supported where {PROJECTOR}linear_2 is an identity; multiply the two")
    return {name: a for name, a in tensors.items() if not name.startswith(PROJECTOR + "linear_2.")}


def tokenizer_of(directory, config, hf):
    """The tokenizer's directory, once its ids are those that config.json and generation_config.json speak of."""
    tokenizer = fast_tokenizer(directory)
    if tokenizer is None:
        raise CheckpointError(f"{directory}: neither tokenizer.json nor tokenizer.model is there")
    wanted, found = hf.get("image_token_index", hf.get("image_token_id", 32000)), token_id(tokenizer, config.image_token)
    if wanted != found:
        raise CheckpointError(f"{directory}: {config.image_token} is token {found} of the tokenizer, image_token_index of config.json is {wanted}")
    file = directory / "generation_config.json"
    ends = (read_json(file) if file.is_file() else {}).get("eos_token_id")
    if ends is not None and {*np.atleast_1d(ends).tolist()} != {special_id(tokenizer, "eos_token", "</s>")}:
        raise CheckpointError(f"{file}: eos_token_id is {ends}; an answer ends with the tokenizer's one eos_token only, correct it there or here")
    return tokenizer


def config_json(c: ModelConfig, dtype, image, tokenizer):
    """The config.json that `model_config` reads as `c`; `image` is the id of the image token, `tokenizer` a data.tokenizer.Tokenizer."""
    kind = "llava_next" if c.image.fit == "tiles" else "llava"
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "image_token_index": image,
        "image_seq_length": c.image.rows,
        "projector_hidden_act": next(name for name, ours in PROJECTORS.items() if ours.items() <= vars(c.image.adapter).items()),
        "multimodal_projector_bias": True,
        "vision_feature_layer": c.image.encoders[0].feature_layer,
        "vision_feature_select_strategy": processor.strategy_of(c),
        "tie_word_embeddings": c.decoder.tied,
        "torch_dtype": dtype,
        "text_config": decoders.decoder_json(c.decoder, dtype, tokenizer.ends),
        "vision_config": tower(c.image.encoders[0]).encoder_json(c.image.encoders[0], dtype),
        **({"image_grid_pinpoints": processor.pinpoints(c), "use_image_newline_parameter": True} if kind == "llava_next" else {}),
    }
