"""Every setting of models, data, training and generation, as plain dataclasses.

A config file builds a `TrainConfig`, the command line changes fields (types are kept, unknown names are
refused), and `validate()` checks the whole.
"""

from omnifusion_jax.config.base import check, from_dict, one_of, same_settings, to_json, tuples, variant
from omnifusion_jax.config.decoder import DecoderConfig, RopeScaling
from omnifusion_jax.config.encoder import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    HANDED_ON,
    IMAGENET_MEAN,
    IMAGENET_STD,
    EncoderConfig,
)
from omnifusion_jax.config.generation import GenerationConfig
from omnifusion_jax.config.lora import LoraConfig
from omnifusion_jax.config.model import ModelConfig, of_encoders, part_of
from omnifusion_jax.config.preference import PreferenceConfig
from omnifusion_jax.config.streams import AdapterConfig, ImageConfig, StreamConfig, View, adapter
from omnifusion_jax.config.training import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    OptimizerConfig,
    SetConfig,
    TrainConfig,
)

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HALF",
    "HANDED_ON",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AdapterConfig",
    "CheckpointConfig",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "EvalConfig",
    "GenerationConfig",
    "ImageConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PreferenceConfig",
    "RopeScaling",
    "SetConfig",
    "StreamConfig",
    "TrainConfig",
    "View",
    "adapter",
    "check",
    "from_dict",
    "of_encoders",
    "one_of",
    "part_of",
    "same_settings",
    "to_json",
    "tuples",
    "variant",
]
