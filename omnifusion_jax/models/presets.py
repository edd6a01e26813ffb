"""Model sizes by name."""

import dataclasses

from omnifusion_jax.config import AdapterConfig, DecoderConfig, EncoderConfig, ModelConfig
from omnifusion_jax.errors import ConfigError

PRESETS = {
    # CLIP-ViT-L/14-336, one transformer layer and a linear map, Mistral-7B-v0.1
    "omnifusion-1.1": lambda: ModelConfig(),
    # The same system small enough to train on two CPU cores: 96-pixel pictures, 36 patches
    "omnifusion-tiny": lambda: ModelConfig(
        encoder=EncoderConfig(image_size=96, patch=16, embed=128, layers=5, heads=4, mlp=512),
        adapter=AdapterConfig(heads=4, mlp=256),
        decoder=DecoderConfig(vocab=852, embed=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=384, max_length=2048),
    ),
}


PARTS = ("encoder", "encoder2", "adapter", "decoder", "image")


def preset(name) -> ModelConfig:
    """A fresh, changeable ModelConfig. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"there is no model preset {name!r}; choose from {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name](), preset=name, filled_from=name)


def resolve(c: ModelConfig) -> ModelConfig:
    """Follows a changed preset name (`--config.model.preset=omnifusion-tiny`); fields that were changed besides keep their values."""
    if c.preset == c.filled_from:
        return c
    old, new = preset(c.filled_from), preset(c.preset)
    for ours, theirs, now in ((c, old, new), *((getattr(c, part), getattr(old, part), getattr(new, part)) for part in PARTS)):
        for field in dataclasses.fields(ours) if ours and theirs and now else ():
            name, value = field.name, getattr(ours, field.name)
            if name not in (*PARTS, "preset", "filled_from") and value != getattr(theirs, name):
                setattr(now, name, value)
    return new
