"""Reads the config.json of OmniLMM and MiniCPM-V into a ModelConfig, and writes one."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.omnilmm.systems import HEAD_DIM, SYSTEMS, System
from omnifusion_jax.checkpoints.storage.settings import require
from omnifusion_jax.config import ImageConfig, ModelConfig, adapter
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models.presets import budget
from omnifusion_jax.published_templates import TEMPLATES

ONLY = {"mm_use_im_start_end": (True,), "quantization_config": (None,)}
SLICED = {  # settings of MiniCPM-V 2.0, with its defaults
    "slice_mode": False,
    "max_slice_nums": 9,
    "scale_resolution": 448,
}


def model_config(hf: dict, tensors: Mapping[str, np.ndarray], where: str | Path) -> ModelConfig:
    """The config that config.json and the shapes of the tensors describe; all sizes come from the tensors.

    Raises:
      CheckpointError: a setting is not supported, or a tensor that says a size is missing.
    """
    system = SYSTEMS[hf["model_type"]]
    require(hf, ONLY, where)
    head = system.language + language_models.HEAD
    text = {**hf, "model_type": system.family}
    text.setdefault("tie_word_embeddings", head not in tensors)
    decoder = language_models.decoder_config(text, where)
    settings = {name: hf.get(name, value) for name, value in SLICED.items()}
    sliced, query = settings["slice_mode"], tensors.get(system.resampler + "query")
    if query is None:
        raise CheckpointError(
            f"{where}: {system.resampler}query is missing, which says how many queries there are"
        )
    if hf.get(system.queries_setting, len(query)) != len(query):
        raise CheckpointError(
            f"{where}: {system.queries_setting} is {hf[system.queries_setting]}, "
            f"{system.resampler}query has {len(query)} rows"
        )
    size = settings["scale_resolution"] if sliced else hf.get("image_size", 448)
    encoder = vision(hf, tensors, system, where, image_size=size)
    encoder.budget = budget(encoder) if sliced else None
    require({"patch_size": hf.get("patch_size", encoder.patch)}, {"patch_size": (encoder.patch,)}, where)
    joins = adapter("resampler", queries=len(query), heads=max(1, decoder.width // HEAD_DIM), adaptive=sliced)
    fit = "slices" if sliced else "squash"
    image = ImageConfig(
        (encoder,), joins, token=system.token, fit=fit, slices=settings["max_slice_nums"] if sliced else 9
    )
    config = ModelConfig(
        preset=hf["model_type"],
        filled_from=hf["model_type"],
        image=image,
        decoder=decoder,
        layout="template",
        prompt="",
        template=TEMPLATES[system.templates[fit]],
        labels=system.labels,
    )
    config.validate()
    return config


def vision(hf: dict, tensors, system: System, where, **settings):
    """The config of the tower: sizes from the tensors, heads from the name that timm has for it."""
    named = hf.get(system.tower_setting) or system.tower_name
    found = re.match(system.tower.architecture, Path(named).name)
    if not found or found[1] not in system.tower.heads:
        raise CheckpointError(
            f"{where}: {system.tower_setting} is {named!r:.100}, supported is one like {system.tower_name!r}"
        )
    own = {
        name.removeprefix(system.vision): a for name, a in tensors.items() if name.startswith(system.vision)
    }
    heads = system.tower.heads[found[1]]
    read = {"feature_layer": -1, "feature_norm": True}  # the blocks that are there, and the last norm
    encoder = system.tower.encoder_config(own, where, heads=heads, **read, **settings)
    return encoder.canonical()


def config_json(c: ModelConfig, system: System, dtype: str, ends: dict) -> dict:
    """The config.json that `model_config` reads as `c`; `ends` is `Tokenizer.ends`."""
    kind = next(name for name, one in SYSTEMS.items() if one is system)
    encoder, sliced = c.image.encoders[0], c.image.fit == "slices"
    slices = {
        "slice_mode": sliced,
        "max_slice_nums": c.image.slices,
        "scale_resolution": encoder.image_size,
        "patch_size": encoder.patch,
    }
    of_kind = {
        "omnilmm": {"use_mm_proj": True, "tune_clip": True},
        "minicpmv": {
            "auto_map": {
                "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
                "AutoModel": "modeling_minicpmv.MiniCPMV",
                "AutoModelForCausalLM": "modeling_minicpmv.MiniCPMV",
            },
            "drop_vision_last_layer": True,
            **(slices if sliced else {}),
        },
    }
    return {
        **language_models.decoder_json(c.decoder, dtype, ends),
        "architectures": [system.architecture],
        "model_type": kind,
        system.tower_setting: system.tower_name,
        system.queries_setting: c.image.adapter.queries,
        "image_size": encoder.image_size,
        "mm_use_im_start_end": True,
        **of_kind[kind],
    }
