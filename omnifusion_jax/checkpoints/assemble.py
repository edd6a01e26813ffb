"""A model put together from separate checkpoints: vision towers and a language model; what joins them is yet to be trained."""

import dataclasses

import jax

from omnifusion_jax.checkpoints import native
from omnifusion_jax.checkpoints.checkpoint import Checkpoint, check_tokenizer
from omnifusion_jax.checkpoints.encoders import vision_towers
from omnifusion_jax.checkpoints.load import load_decoder, load_encoder
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.storage import hub
from omnifusion_jax.config import HANDED_ON, ImageConfig, ModelConfig, adapter
from omnifusion_jax.models.omnifusion import OmniFusion, cast
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx

SEED = 0


def from_parts(decoder, vision, vision2=None, name=None, dtype=None) -> tuple[Checkpoint, tuple[str, ...]]:
    """A whole model, and the names of its parts that are fresh ("image/adapter", and "special" where the layout has trained vectors).

    Args:
      decoder: a language model, as `load_decoder` takes it.
      vision: a vision tower, as `load_encoder` takes it.
      vision2: the second one.
      name: the preset that says how they are joined: adapter, layout, pictures, and which features are used. None: OmniFusion-1.1's transformer
        adapter, or the sum where there are two towers, and pictures fitted as the first tower is used to.
      dtype: "bfloat16", "float32" or a numpy type; None keeps what is stored, and the language model's for what is fresh.

    Raises:
      CheckpointError: a part is not there, or of no known format, or the language model has no tokenizer.
      ConfigError: the preset is not known, or joins another number of towers.
    """
    sources = [source for source in (vision, vision2) if source]
    towers = [load_encoder(source, f"image/encoders/{i}", dtype) for i, source in enumerate(sources)]
    stored, arrays, tokenizer = load_decoder(decoder, dtype)
    check_tokenizer(tokenizer, stored, decoder)
    config = joined(preset(name) if name else plain(sources), [c for c, _ in towers], stored)
    for _, found in towers:
        arrays = arrays | found
    missing = [path for path in shapes_of(config) if path not in arrays]
    arrays = arrays | cast(fresh(config, missing), dtype or arrays["decoder/embed"].dtype)
    return Checkpoint(config, arrays, tokenizer, "parts"), tuple(
        part for part in config.parts if any(path.startswith(f"{part}/") for path in missing)
    )


def plain(sources):
    """How parts are joined where no preset says it."""
    first = hub.local(sources[0], files=True)
    fit = (
        native.read_config(first)[0].image.fit
        if native.is_native(first)
        else vision_towers.preferred_fit(first)
    )
    kind = "transformer" if len(sources) == 1 else "sum"
    return ModelConfig(preset="parts", filled_from="parts", image=ImageConfig(adapter=adapter(kind), fit=fit))


def joined(config, towers, decoder):
    """`config` with the parts that were found; which of a tower's features are used stays the config's affair."""
    ours, joins = config.image.encoders, config.image.adapter
    kept = [
        {field: getattr(ours[min(i, len(ours) - 1)], field) for field in HANDED_ON}
        for i in range(len(towers))
    ]
    found = tuple(dataclasses.replace(tower, **fields) for tower, fields in zip(towers, kept, strict=True))
    if joins.kind == "mlp" and joins.mlp == config.decoder.width:  # LLaVA's is as wide as its language model
        joins = dataclasses.replace(joins, mlp=decoder.width)
    config = dataclasses.replace(
        config, image=dataclasses.replace(config.image, encoders=found, adapter=joins), decoder=decoder
    )
    config.validate()
    return config


def fresh(config, paths):
    """The parameters at `paths` as training would start them."""

    def draw():
        arrays = nnx.parameters(OmniFusion(config, rngs=nnx.Rngs(SEED)))
        return {path: arrays[path] for path in paths}

    return jax.jit(draw)()  # what is not asked for takes no memory
