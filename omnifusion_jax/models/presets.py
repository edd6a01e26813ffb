"""Whole models by name.

A preset has encoders from models/encoder_presets.py, an adapter and a decoder, and says how pictures are
prepared and dialogues are laid out.
"""

import dataclasses
import math

from omnifusion_jax.config import DecoderConfig, EncoderConfig, ImageConfig, ModelConfig
from omnifusion_jax.config import adapter as make_adapter
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.encoder_presets import encoder as vision
from omnifusion_jax.published_templates import TEMPLATES

LLAMA = DecoderConfig(family="llama", kv_heads=32, mlp=11008, window=None, max_length=4096)
DECODERS = {
    "mistral-7b": DecoderConfig(),  # Mistral-7B-v0.1, arXiv 2310.06825
    "mistral-7b-v0.2": DecoderConfig(rope_theta=1e6, window=None),
    "vicuna-7b": LLAMA,  # v1.5, and Llama-2 from which it was made (arXiv 2307.09288)
    "zephyr-7b": DecoderConfig(vocab=32003),  # beta (arXiv 2310.16944), with OmniLMM's three tokens
    "minicpm-2.4b": DecoderConfig(  # arXiv 2404.06395
        family="minicpm",
        vocab=122753,
        width=2304,
        layers=40,
        heads=36,
        kv_heads=36,
        head_dim=64,
        mlp=5760,
        window=None,
        max_length=4096,
        embed_scale=12.0,
        residual_scale=1.4 / math.sqrt(40),
        logit_scale=256 / 2304,
    ),
    "vicuna-13b": dataclasses.replace(LLAMA, width=5120, layers=40, heads=40, kv_heads=40, mlp=13824),
}

CLIP = "clip-vit-l-14-336"
BOTH = (CLIP, "dinov2-l")
# Rows of the report's tables (arXiv 2404.06212) for any decoder: how they differ from CLIP-L/14-336 with a
# transformer adapter.
ROWS = {
    "bigg": {"encoders": ("clip-vit-bigg-14",)},  # tables 3 and 4
    "clip-l": {},
    "siglip-b": {"encoders": ("siglip-base-16-512",), "fit": "squash"},
    "internvit-6b": {"encoders": ("internvit-6b-448",)},
    "concat": {"encoders": BOTH, "adapter": "concat"},  # table 5
    "sum": {"encoders": BOTH, "adapter": "sum"},
    "attention": {"encoders": BOTH, "adapter": "attention"},
    "grid": {"fit": "tiles"},  # table 6
}


def pictures(encoders=(CLIP,), adapter="transformer", **settings):
    """A fresh ImageConfig of named encoders; `adapter` is a kind of adapter, or its settings."""
    adapter = make_adapter(adapter) if isinstance(adapter, str) else adapter
    return ImageConfig(tuple(map(vision, encoders)), adapter, **settings)


def model(decoder, image=None, **settings):
    """A fresh ModelConfig that shares nothing with the tables; `image` holds arguments of `pictures`."""
    return ModelConfig(decoder=dataclasses.replace(decoder), image=pictures(**(image or {})), **settings)


def llava(decoder, template, **image):
    """LLaVA-1.5 (arXiv 2310.03744) as converted for Hugging Face.

    The vocabulary is padded, and the two-layer adapter is as wide as the decoder.
    """
    decoder = dataclasses.replace(DECODERS[decoder], vocab=32064)
    image["adapter"] = make_adapter("mlp", mlp=decoder.width)
    return model(decoder, image, layout="template", prompt="", template=TEMPLATES[template])


def budget(encoder: EncoderConfig) -> int:
    """The patches for which MiniCPM-V 2.0 gets room in a picture or slice: an eighth more than are meant.

    At 448 pixels and patches of 14 they are 1152, and no picture has more whose sides differ by less than 64
    times.
    """
    return encoder.side**2 * 9 // 8


def omnilmm(decoder, tower, layers, template, labels, token, fit="squash", **settings):
    """OmniLMM and MiniCPM-V: a tower as timm computes it, without its last block, and a resampler.

    `settings` are further fields of the encoder.
    """
    encoder = dataclasses.replace(
        vision(tower),
        layers=layers,
        image_size=448,
        position_resize="bicubic_antialias",
        feature_layer=-1,
        feature_norm=True,
        activation="gelu",
        **settings,
    )
    encoder.budget = budget(encoder) if fit == "slices" else None
    decoder = dataclasses.replace(DECODERS[decoder])
    joins = make_adapter("resampler", heads=decoder.width // 128, adaptive=fit == "slices")
    return ModelConfig(
        image=ImageConfig((encoder,), joins, token=token, fit=fit),
        decoder=decoder,
        layout="template",
        prompt="",
        template=TEMPLATES[template],
        labels=labels,
    )


def minicpm_v(**settings):
    tower = {"tower": "siglip-so400m-14-384", "layers": 26, "position_grid": 27}
    return omnilmm("minicpm-2.4b", template="minicpm-v", labels="ends", token="<unk>", **tower, **settings)


def tiny():
    """An OmniFusion-1.1 that is small enough to train on two CPU cores: 96-pixel pictures, 36 patches."""
    return ModelConfig(
        image=ImageConfig(
            (EncoderConfig(image_size=96, patch=16, width=128, layers=5, heads=4, mlp=512),),
            make_adapter("transformer", heads=4, mlp=256),
        ),
        decoder=DecoderConfig(
            vocab=852, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=384, max_length=2048
        ),
    )


def research():
    """The model of OmniFusion-1.0's research code.

    It has features of CLIP-bigG's last block, and turns are marked in words.
    """
    c = model(DECODERS["mistral-7b"], {"encoders": ("clip-vit-bigg-14",)}, layout="text")
    c.image.encoders[0].feature_layer = -1
    return c


REPORTED = ("mistral-7b", "vicuna-7b", "vicuna-13b")  # the report's decoders
PRESETS = {
    "omnifusion-tiny": tiny,
    "omnifusion-1.0": lambda: model(DECODERS["mistral-7b"]),  # the released weights have the parts of 1.1
    "omnifusion-1.0-bigg": research,
    "omnifusion-1.1": lambda: model(DECODERS["mistral-7b"]),
    "omnifusion-1.1-mix": lambda: model(DECODERS["mistral-7b"], ROWS["sum"]),
    "llava-1.5-7b": lambda: llava("vicuna-7b", "llava-1.5"),
    "llava-1.5-13b": lambda: llava("vicuna-13b", "llava-1.5"),
    "llava-next-mistral-7b": lambda: llava(
        "mistral-7b-v0.2", "llava-next-mistral", fit="tiles", unpad=True, newline=True
    ),
    "omnilmm-12b": lambda: omnilmm(
        "zephyr-7b", "eva02-e-14", 63, "omnilmm", "omnilmm", "<im_patch>", position_grid=16
    ),
    "minicpm-v-1.0": minicpm_v,  # OmniLMM-3B
    "minicpm-v-2.0": lambda: minicpm_v(fit="slices"),
    **{
        f"report-{row}-{decoder}": lambda row=row, decoder=decoder: model(DECODERS[decoder], ROWS[row])
        for row in ROWS
        for decoder in REPORTED
    },
}


def preset(name: str) -> ModelConfig:
    """A fresh ModelConfig that the caller may change.

    Raises:
      ConfigError: the name is unknown.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no model preset {name!r}; choose from {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name](), preset=name, filled_from=name)


def resolve(c: ModelConfig) -> ModelConfig:
    """Applies a changed preset name (`--config.model.preset=omnifusion-tiny`).

    Fields that differ from the preset that filled them keep their values if the new preset has them too.

    Raises:
      ConfigError: the preset is unknown.
    """
    if c.preset == c.filled_from:
        return c
    old, new = preset(c.filled_from), preset(c.preset)
    keep(c, old, new)
    return new


def keep(ours, theirs, now):
    """Copies to `now` the fields of `ours` that differ from `theirs`, also within nested configs.

    Where a nested config has another class now, such as an adapter of another kind, only the fields that both
    classes have are copied.
    """
    for field in dataclasses.fields(ours):
        mine, other, new = (getattr(c, field.name, None) for c in (ours, theirs, now))
        if field.name in ("preset", "filled_from") or mine == other or not hasattr(now, field.name):
            continue
        of_configs = isinstance(mine, tuple) and any(map(dataclasses.is_dataclass, mine))
        if dataclasses.is_dataclass(mine) and type(mine) is type(other) and dataclasses.is_dataclass(new):
            keep(mine, other, new)
        elif of_configs and len(mine) == len(other) == len(new):
            for triple in zip(mine, other, new, strict=True):
                keep(*triple)
        else:
            setattr(now, field.name, mine)
