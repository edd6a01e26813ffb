"""Writes docs/presets.md: python examples/presets.py > docs/presets.md"""

import math

from omnifusion_jax.models.encoder_presets import PUBLISHED
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import PRESETS, preset
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx

TOP = """# Presets

Written by `python examples/presets.py > docs/presets.md`. \
Parameters are counted on shapes (`jax.eval_shape`), whatever the size.

## Models

`--config.model.preset=NAME` in training; `omnifusion_jax.models.presets.preset(NAME)` in Python. \
`report-ROW-DECODER` are the rows of
tables 4, 5 and 6 of the report ([arXiv 2404.06212](https://arxiv.org/abs/2404.06212)), \
trained by `configs/report/`. "Rows" are the token
embeddings that a picture, or one tile of it, gives.

| preset | encoders | adapter | picture | rows | encoders | adapter | vectors | decoder | all |
|---|---|---|---|---|---|---|---|---|---|"""

MEMORY = """
## Memory

For parameters, over all devices together; activations come on top. Answering takes two bytes a parameter
(bfloat16). In training a frozen parameter takes two bytes and a trained one 16: the weight, its gradient and
two moments of AdamW in float32. Phase 1 trains the adapter and the special vectors, phase 2 the decoder too.

| preset | parameters | answering | phase 1 | phase 2 |
|---|---|---|---|---|"""

BELOW = """
## Encoders

In a model's config they are `model.image.encoders`; \
`--config.parts_from.image/encoders/0=DIR` names the weights of the first. The vision tower is
counted as it is here: without heads and text towers.

| encoder | pixels | patch | layers | width | heads | activation | parameters |
|---|---|---|---|---|---|---|---|"""


def count(module, prefix=""):
    """Number of parameters whose paths begin with `prefix`."""
    return sum(math.prod(a.shape) for path, a in nnx.parameters(module).items() if path.startswith(prefix))


def name_of(encoder):
    """The preset that has this encoder's weights; the layer that features come from is the model's choice."""
    plain = lambda c: {**vars(c), "feature_layer": None}
    return next((name for name, other in PUBLISHED.items() if plain(other) == plain(encoder)), "its own")


def model_row(name):
    c, model = preset(name), abstract(preset(name))
    parts = [count(model, part) for part in ("image/encoders/", "image/adapter/", "special/", "decoder/")]
    encoders = " + ".join(map(name_of, c.image.encoders))
    counts = " | ".join(f"{n:,}" for n in [*parts, sum(parts)])
    return f"| {name} | {encoders} | {c.image.adapter.kind} | {c.image.fit} | {c.image.rows} | {counts} |"


def memory_row(name):
    """GB of parameters, gradients and moments: two bytes a frozen parameter, 16 a trained one."""
    model = abstract(preset(name))
    frozen, joins, decoder = (
        count(model, prefixes) for prefixes in ("image/encoders/", ("image/adapter/", "special/"), "decoder/")
    )
    whole = frozen + joins + decoder
    needs = 2 * whole, 2 * (frozen + decoder) + 16 * joins, 2 * frozen + 16 * (joins + decoder)
    return f"| {name} | {' | '.join([f'{whole:,}', *map(gigabytes, needs)])} |"


def gigabytes(size):
    return f"{size / 1e9:.3f} GB" if size < 1e8 else f"{size / 1e9:.1f} GB"


def encoder_row(name, c):
    total = count(nnx.eval_shape(lambda: VisionTransformer(c, rngs=nnx.Rngs(0))))
    settings = f"{c.image_size} | {c.patch} | {c.layers} | {c.width} | {c.heads} | {c.activation}"
    return f"| {name} | {settings} | {total:,} |"


def page():
    models = [model_row(name) for name in PRESETS]
    encoders = [encoder_row(name, c) for name, c in PUBLISHED.items()]
    memory = [memory_row(name) for name in PRESETS]
    return "\n".join([TOP, *models, MEMORY, *memory, BELOW, *encoders])


if __name__ == "__main__":
    print(page())
