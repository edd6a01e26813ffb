"""A model put together from separate checkpoints: vision towers and a language model.

What joins them, the adapter and the special vectors, starts fresh and is yet to be trained.
"""

import dataclasses
from pathlib import Path

import jax

from omnifusion_jax.checkpoints import integers, native
from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_tokenizer
from omnifusion_jax.checkpoints.encoders import vision_towers
from omnifusion_jax.checkpoints.load import load_decoder, load_encoder
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.storage import hub
from omnifusion_jax.config import HANDED_ON, DecoderConfig, EncoderConfig, ImageConfig, ModelConfig, adapter
from omnifusion_jax.models.omnifusion import OmniFusion, cast
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx

SEED = 0


def from_parts(
    decoder: str | Path,
    vision: str | Path,
    vision2: str | Path | None = None,
    name: str | None = None,
    dtype=None,
) -> tuple[Checkpoint, tuple[str, ...]]:
    """A whole model, and the names of its parts that are freshly initialised.

    Those are "image/adapter", and "special" where the layout has trained vectors.

    Args:
      decoder: a language model, as `load_decoder` takes it.
      vision: a vision tower, as `load_encoder` takes it.
      vision2: the second vision tower, if there is one.
      name: the preset that says how they are joined: adapter, layout, pictures, and which features are used.
        None takes OmniFusion-1.1's transformer adapter for one tower and the sum for two, and fits pictures
        as the first tower expects them.
      dtype: "bfloat16", "float32" or a numpy type. None keeps the stored types; fresh arrays then take the
        language model's.

    Raises:
      CheckpointError: a part is missing or of no known format, or the language model has no tokenizer.
      ConfigError: the preset is unknown, or joins another number of towers.
    """
    sources = [source for source in (vision, vision2) if source]
    towers = [load_encoder(source, f"image/encoders/{i}", dtype) for i, source in enumerate(sources)]
    stored, arrays, tokenizer = load_decoder(decoder, dtype)
    check_tokenizer(tokenizer, stored, decoder)
    outline = preset(name) if name else plain(sources)
    config = joined(outline, [c for c, _ in towers], stored)
    for _, found in towers:
        arrays = arrays | found
    missing = [path for path in shapes_of(config) if path not in arrays]
    arrays = arrays | cast(fresh(config, missing), dtype or integers.values_dtype(arrays))
    fresh_parts = (part for part in config.parts if any(path.startswith(f"{part}/") for path in missing))
    return Checkpoint(config, arrays, tokenizer, "parts"), tuple(fresh_parts)


def plain(sources) -> ModelConfig:
    """How the parts are joined when no preset is given."""
    first = hub.local(sources[0], files=True)
    if native.is_native(first):
        fit = native.read_config(first)[0].image.fit
    else:
        fit = vision_towers.preferred_fit(first)
    kind = "transformer" if len(sources) == 1 else "sum"
    return ModelConfig(preset="parts", filled_from="parts", image=ImageConfig(adapter=adapter(kind), fit=fit))


def joined(config: ModelConfig, towers: list[EncoderConfig], decoder: DecoderConfig) -> ModelConfig:
    """`config` with the parts that were found. It still decides which of a tower's features are used."""
    ours, joins = config.image.encoders, config.image.adapter
    found = []
    for i, tower in enumerate(towers):
        outline = ours[min(i, len(ours) - 1)]
        kept = {field: getattr(outline, field) for field in HANDED_ON}
        found.append(dataclasses.replace(tower, **kept))
    if joins.kind == "mlp" and joins.mlp == config.decoder.width:  # LLaVA's is as wide as its language model
        joins = dataclasses.replace(joins, mlp=decoder.width)
    image = dataclasses.replace(config.image, encoders=tuple(found), adapter=joins)
    config = dataclasses.replace(config, image=image, decoder=decoder)
    config.validate()
    return config


def fresh(config: ModelConfig, paths) -> dict[str, jax.Array]:
    """The parameters at `paths`, initialised as training would initialise them."""

    def draw():
        arrays = nnx.parameters(OmniFusion(config, rngs=nnx.Rngs(SEED)))
        return {path: arrays[path] for path in paths}

    return jax.jit(draw)()  # under jit, parameters that are not returned take no memory
