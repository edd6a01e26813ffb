"""Reads LLaVA and LLaVA-NeXT as Hugging Face has them.

Their classes are `LlavaForConditionalGeneration` and `LlavaNextForConditionalGeneration`.
"""

from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.llava.settings import CLASSES, model_config
from omnifusion_jax.checkpoints.llava.tables import IGNORED, LANGUAGE, PROJECTOR, public_names, table
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import from_foreign
from omnifusion_jax.checkpoints.storage.lazy_array import Lazy
from omnifusion_jax.checkpoints.storage.settings import read_json
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer, special_id, token_id
from omnifusion_jax.config import ModelConfig
from omnifusion_jax.errors import CheckpointError


def is_llava(directory: str | Path) -> bool:
    file = Path(directory) / "config.json"
    return file.is_file() and read_json(file).get("model_type") in CLASSES


def read(directory: str | Path, dtype=None) -> tuple[ModelConfig, dict[str, Lazy], Path]:
    """(ModelConfig, {path: Lazy}, tokenizer directory). Prompts follow the directory's own chat template.

    Raises:
      CheckpointError: a file is missing, a setting is not supported, files contradict each other, or tensors
        do not fit (all are listed).
    """
    directory = Path(directory)
    hf = read_json(directory / "config.json")
    tensors = public_names(open_tensors(directory), directory)
    config, tower = model_config(hf, directory)
    if config.image.adapter.kind == "linear":
        tensors = without_identity(tensors, directory)
    elif (name := PROJECTOR + "linear_1.bias") in tensors:
        config.image.adapter.mlp = len(tensors[name])
    config.validate()
    tensors = language_models.without_copy(tensors, config.decoder, directory, LANGUAGE)
    arrays = from_foreign(
        tensors, table(config, tower), shapes_of(config), directory, ignore=IGNORED, dtype=dtype
    )
    return config, arrays, tokenizer_of(directory, config, hf)


def without_identity(tensors, where):
    """The tensors without the projector's second layer, for a projector without an activation.

    Such a projector is one linear map if its second layer is an identity; no other is supported.
    """
    weight, bias = (tensors.get(f"{PROJECTOR}linear_2.{name}") for name in ("weight", "bias"))
    if weight is None or bias is None:
        raise CheckpointError(f"{where}: {PROJECTOR}linear_2.weight or .bias is missing")
    if bias.any() or not np.array_equal(weight, np.eye(*weight.shape, dtype=weight.dtype)):
        raise CheckpointError(
            f"{where}: projector_hidden_act 'linear' is supported where {PROJECTOR}linear_2 is an identity; "
            "multiply the two"
        )
    return {name: a for name, a in tensors.items() if not name.startswith(PROJECTOR + "linear_2.")}


def tokenizer_of(directory: Path, config: ModelConfig, hf: dict) -> Path:
    """The tokenizer's directory. Its ids are checked against config.json and generation_config.json."""
    tokenizer = fast_tokenizer(directory)
    if tokenizer is None:
        raise CheckpointError(f"{directory}: neither tokenizer.json nor tokenizer.model is there")
    wanted = hf.get("image_token_index", hf.get("image_token_id", 32000))
    found = token_id(tokenizer, config.image.token)
    if wanted != found:
        raise CheckpointError(
            f"{directory}: {config.image.token} is token {found} of the tokenizer, "
            f"image_token_index of config.json is {wanted}"
        )
    file = directory / "generation_config.json"
    ends = (read_json(file) if file.is_file() else {}).get("eos_token_id")
    if ends is not None and {*np.atleast_1d(ends).tolist()} != {special_id(tokenizer, "eos_token", "</s>")}:
        raise CheckpointError(
            f"{file}: eos_token_id is {ends}; an answer ends with the tokenizer's one eos_token only, "
            "correct it there or here"
        )
    return tokenizer
