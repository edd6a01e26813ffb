"""Whole models by name: encoders from models/encoders.py, an adapter, a decoder, and how they are shown pictures and dialogues."""

import copy
import dataclasses

from omnifusion_jax.config import AdapterConfig, DecoderConfig, EncoderConfig, ImageConfig, ModelConfig, check
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.encoders import encoder as vision
from omnifusion_jax.templates import TEMPLATES

LLAMA = DecoderConfig(family="llama", kv_heads=32, mlp=11008, window=None, max_length=4096)
DECODERS = {
    "mistral-7b": DecoderConfig(),  # Mistral-7B-v0.1, arXiv 2310.06825
    "mistral-7b-v0.2": DecoderConfig(rope_theta=1e6, window=None),
    "vicuna-7b": LLAMA,  # v1.5, and Llama-2 from which it was made (arXiv 2307.09288)
    "vicuna-13b": dataclasses.replace(LLAMA, embed=5120, layers=40, heads=40, kv_heads=40, mlp=13824),
}

# Rows of the report (arXiv 2404.06212), whatever their decoder: what differs from CLIP-L/14-336 with a transformer adapter
ROWS = {
    "bigg": {"encoder": "clip-vit-bigg-14"},  # tables 3 and 4
    "clip-l": {},
    "siglip-b": {"encoder": "siglip-base-16-512", "image": ImageConfig(fit="squash")},
    "internvit-6b": {"encoder": "internvit-6b-448"},
    "concat": {"encoder2": "dinov2-l", "adapter": AdapterConfig("concat")},  # table 5
    "sum": {"encoder2": "dinov2-l", "adapter": AdapterConfig("sum")},
    "attention": {"encoder2": "dinov2-l", "adapter": AdapterConfig("attention")},
    "grid": {"image": ImageConfig(fit="tiles")},  # table 6
}


def model(decoder, encoder="clip-vit-l-14-336", encoder2=None, **settings):
    """A fresh ModelConfig: nothing in it is shared with the tables."""
    encoders = {"encoder": vision(encoder), "encoder2": encoder2 and vision(encoder2)}
    return ModelConfig(decoder=dataclasses.replace(decoder), **encoders, **{k: copy.copy(v) for k, v in settings.items()})


def llava(decoder, template, **settings):
    """LLaVA-1.5 (arXiv 2310.03744), as converted for Hugging Face: the vocabulary is padded, a two-layer adapter as wide as the decoder."""
    decoder = dataclasses.replace(DECODERS[decoder], vocab=32064)
    adapter = AdapterConfig("mlp", mlp=decoder.embed)
    return model(decoder, adapter=adapter, layout="template", prompt="", template=TEMPLATES[template], **settings)


def tiny():
    """OmniFusion-1.1 small enough to train on two CPU cores: 96-pixel pictures, 36 patches."""
    return ModelConfig(
        encoder=EncoderConfig(image_size=96, patch=16, embed=128, layers=5, heads=4, mlp=512),
        adapter=AdapterConfig(heads=4, mlp=256),
        decoder=DecoderConfig(vocab=852, embed=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=384, max_length=2048),
    )


def research():
    """What the research code of OmniFusion-1.0 ran: features of CLIP-bigG's last block, turns marked in words."""
    c = model(DECODERS["mistral-7b"], encoder="clip-vit-bigg-14", layout="text")
    c.encoder.feature_layer = -1
    return c


REPORTED = ("mistral-7b", "vicuna-7b", "vicuna-13b")  # decoders
PRESETS = {
    "omnifusion-tiny": tiny,
    "omnifusion-1.0": lambda: model(DECODERS["mistral-7b"]),  # the released weights have the parts of 1.1
    "omnifusion-1.0-bigg": research,
    "omnifusion-1.1": lambda: model(DECODERS["mistral-7b"]),
    "omnifusion-1.1-mix": lambda: model(DECODERS["mistral-7b"], **ROWS["sum"]),
    "llava-1.5-7b": lambda: llava("vicuna-7b", "llava-1.5"),
    "llava-1.5-13b": lambda: llava("vicuna-13b", "llava-1.5"),
    "llava-next-mistral-7b": lambda: llava("mistral-7b-v0.2", "llava-next-mistral", image=ImageConfig(fit="tiles", unpad=True, newline=True)),
    **{f"report-{row}-{decoder}": lambda row=row, decoder=decoder: model(DECODERS[decoder], **ROWS[row]) for row in ROWS for decoder in REPORTED},
}

PARTS = ("encoder", "encoder2", "adapter", "decoder", "image")


def preset(name) -> ModelConfig:
    """A fresh, changeable ModelConfig. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"there is no model preset {name!r}; choose from {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name](), preset=name, filled_from=name)


def resolve(c: ModelConfig, given=()) -> ModelConfig:
    """Follows a changed preset name (`--config.model.preset=omnifusion-tiny`).

    Two kinds of fields keep their values: those that the config file had changed against its own preset, and those
    that the command line set, whatever they were before. `given` names the latter, as `model.adapter.kind`. Raises
    ConfigError for such a field of a part that the new preset lacks.
    """
    if c.preset == c.filled_from:
        return c
    old, new = preset(c.filled_from), preset(c.preset)
    keep(c, old, new, "model", given)
    for part in PARTS:
        path = f"model.{part}"
        ours, theirs, now = (getattr(m, part) for m in (c, old, new))
        if (ours is None) != (theirs is None) and not (ours and now and path in given):
            setattr(new, part, ours)  # put in or taken out; `=build` asks for the preset's own
        elif ours:
            keep(ours, theirs or ours, now, path, given)
    return new


def keep(ours, theirs, now, path, given):
    """Brings to `now` the fields of `ours` that differ from `theirs`, or are `given`."""
    names = [field.name for field in dataclasses.fields(ours) if field.name not in (*PARTS, "preset", "filled_from")]
    for name in names:
        value = getattr(ours, name)
        if f"{path}.{name}" in given or value != getattr(theirs, name):
            check(now is not None, f"{path}.{name} is set to {value}, but the new preset has no {path}. Leave it out, or choose one that has")
            setattr(now, name, value)
