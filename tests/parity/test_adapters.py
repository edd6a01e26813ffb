"""Adapters against the same written plainly in PyTorch, and what the layer-wise mix keeps in memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from parity.torch_models import attention_state, layer_state
from torch.nn import functional

from omnifusion_jax.config import EncoderConfig, ImageConfig, adapter
from omnifusion_jax.data.slices import in_patches
from omnifusion_jax.models.adapters import mix
from omnifusion_jax.models.grids import Grids
from omnifusion_jax.models.omnifusion import Stream, abstract
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import ADAPTERS

CLIP = EncoderConfig(image_size=24, patch=8, width=32, layers=3, heads=4, mlp=64)
DINO = EncoderConfig(
    image_size=16, shortest_edge=20, patch=8, width=24, layers=4, heads=2, mlp=40, activation="swiglu",
    eps=1e-6, registers=2, patch_bias=True, layer_scale=True, pre_norm=False, position_grid=5,
)  # fmt: skip
ONE = (
    {"kind": "linear"},
    {"kind": "mlp", "mlp": 40},
    {"kind": "mlp", "mlp": 40, "activation": "gelu_tanh"},
    *(
        {"kind": "resampler", "heads": 2, "queries": n} for n in (4, 9, 16)
    ),  # of 9 patches: a smaller grid, the same, a larger one
    {"kind": "resampler", "heads": 2, "queries": 4, "adaptive": True},
)
MIXES = [
    {"width": 16, "bias": bias, "shared_norm": shared, "first_state": first}
    for bias, shared, first in (("layers", True, 0), ("none", False, 1), ("one", False, 2))
]
SUMS = [
    {"kind": "sum", **mixes, "align": align}
    for mixes, align in zip(MIXES, ("pad", "interpolate", "pad"), strict=True)
]
TWO = [
    {"kind": "concat", "width": 16, "heads": 2, "mlp": 48},
    *SUMS,
    *({"kind": "attention", **mixes, "heads": 2, "queries": 5} for mixes in MIXES),
]


def config(kind, **settings):
    joins = adapter(kind, **settings)
    return dataclasses.replace(
        tiny.config(), image=ImageConfig((CLIP, DINO)[: ADAPTERS[kind].encoders], joins)
    )


def images(c, batch=2):
    rng = np.random.default_rng(0)
    return tuple(
        rng.integers(0, 256, (batch, 1, view.size, view.size, 3), np.uint8) for view in c.image.views
    )


def states(model, images):
    """Of every encoder its hidden states as torch tensors, class token and registers left out."""
    encoders = model.image.encoders
    found = [np.asarray(encoder.hidden_states(x[:, 0])) for encoder, x in zip(encoders, images, strict=True)]
    return [
        torch.tensor(s[:, :, encoder.config.class_token + encoder.config.registers :])
        for s, encoder in zip(found, encoders, strict=True)
    ]


def place(row, column, width):
    """Of one patch: the column's sines, its cosines, the row's sines, its cosines."""
    speeds = [10000 ** (-4 * k / width) for k in range(width // 4)]
    return [f(at * speed) for at in (column, row) for f in (math.sin, math.cos) for speed in speeds]


def places(height, across, width):
    return torch.tensor([place(row, column, width) for row in range(height) for column in range(across)])


class Reference(torch.nn.Module):
    """The published descriptions, one operation after the other. Parameters are read from ours by name."""

    def __init__(self, c, arrays):
        super().__init__()
        self.c, self.p = c, {path: torch.tensor(a) for path, a in arrays.items()}

    def linear(self, x, name):
        return x @ self.p[f"image/adapter/{name}/kernel"] + self.p[f"image/adapter/{name}/bias"]

    def combined(self, i, hidden):
        a, path = self.c.image.adapter, f"image/adapter/mixes/{i}"
        total = 0
        for n, state in enumerate(hidden[a.first_state :]):
            norm = [
                self.p[f"{path}/norm/{x}"] if a.shared_norm else self.p[f"{path}/layers/norm/{x}"][n]
                for x in ("scale", "bias")
            ]
            y = (
                functional.layer_norm(state, state.shape[-1:], *norm, a.eps)
                @ self.p[f"{path}/layers/kernel"][n]
            )
            y = y + self.p[f"{path}/layers/bias"][n] if a.bias == "layers" else y
            total = total + self.p[f"{path}/layers/weight"][n] * y
        return total + self.p[f"{path}/bias"] if a.bias == "one" else total

    def forward(self, hidden):
        a = self.c.image.adapter
        gelu = torch.nn.GELU("tanh" if getattr(a, "activation", "") == "gelu_tanh" else "none")
        kind, rows = a.kind, max(h.shape[2] for h in hidden)
        if kind == "linear":
            return self.linear(hidden[0][-2], "linear")
        if kind == "mlp":
            return self.linear(gelu(self.linear(hidden[0][-2], "up")), "linear")
        if kind == "concat":
            parts = [self.linear(h[-2], f"projections/{i}") for i, h in enumerate(hidden)]
            return self.linear(self.layer(torch.cat(parts, 1)), "linear")
        if kind == "resampler":
            return self.resampled(hidden[0][-2])
        mixed = [self.combined(i, h) for i, h in enumerate(hidden)]
        if kind == "sum":
            return self.linear(gelu(sum(self.aligned(m, rows) for m in mixed)), "linear")
        x = torch.cat([gelu(m) for m in mixed], 1)
        queries = self.p["image/adapter/queries"].expand(len(x), -1, -1)
        return self.linear(gelu(self.attention(queries, x, x)), "linear")

    def attention(self, queries, keys, values):
        attention = torch.nn.MultiheadAttention(
            queries.shape[-1], self.c.image.adapter.heads, batch_first=True
        )
        attention.load_state_dict(attention_state(self.p, "image/adapter/attention"))
        return attention(queries, keys, values)[0]

    def resampled(self, x, shape=None):
        """The resampler of OmniLMM: positions for queries and keys, none for values. `shape`: of the grid."""
        norm = lambda x, name: functional.layer_norm(
            x, x.shape[-1:], *self.norm(name), self.c.image.adapter.eps
        )
        x = norm(
            x @ self.p["image/adapter/projection/kernel"]
            if "image/adapter/projection/kernel" in self.p
            else x,
            "feature_norm",
        )
        (batch, rows, width), side = x.shape, round(self.c.image.adapter.queries**0.5)
        height, across = shape or 2 * (round(rows**0.5),)
        table = places(side, side, width)
        if self.c.image.adapter.adaptive:
            fitted = places(height, across, width)[None]
        else:
            fitted = table.T.reshape(1, width, side, side)
            if height != side:
                size = (height, height)
                fitted = functional.interpolate(fitted, size=size, mode="bicubic", align_corners=False)
            fitted = fitted.flatten(2).transpose(1, 2)
        queries = norm(self.p["image/adapter/queries"], "query_norm") + table
        y = self.attention(queries.expand(batch, -1, -1), x + fitted, x)
        return norm(y, "norm") @ self.p["image/adapter/linear/kernel"]

    def norm(self, name):
        return self.p[f"image/adapter/{name}/scale"], self.p[f"image/adapter/{name}/bias"]

    def aligned(self, x, rows):
        if self.c.image.adapter.align == "pad":
            return torch.cat([x, torch.zeros(len(x), rows - x.shape[1], x.shape[2])], 1)
        old, new = round(x.shape[1] ** 0.5), round(rows**0.5)
        grid = x.reshape(len(x), old, old, -1).permute(0, 3, 1, 2)
        grid = functional.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
        return grid.permute(0, 2, 3, 1).reshape(len(x), rows, -1)

    def layer(self, x):
        a = self.c.image.adapter
        layer = torch.nn.TransformerEncoderLayer(
            a.width, a.heads, a.mlp, batch_first=True, norm_first=False
        ).eval()
        layer.load_state_dict(layer_state(self.p, "image/adapter/layer"))
        return layer(x)


def built(c, seed=0):
    arrays = tiny.arrays(c, seed=seed)
    return arrays, nnx.with_parameters(abstract(c), {path: jnp.asarray(a) for path, a in arrays.items()})


@pytest.mark.parametrize("settings", [*ONE, *TWO], ids=lambda s: "-".join(map(str, s.values())))
def test_embeddings(settings):
    c = config(**settings)
    c.validate()
    arrays, model = built(c)
    pictures = images(c)
    ours = np.asarray(jax.jit(Stream.__call__)(model.image, pictures))
    with torch.no_grad():
        theirs = Reference(c, arrays)(states(model, pictures)).numpy()
    assert ours.shape == theirs.shape == (2, c.image.rows, c.decoder.width)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_a_resampler_of_features_as_wide_as_the_decoder():
    """It has no map that brings them there."""
    c = config("resampler", heads=2, queries=4)
    c.decoder = dataclasses.replace(c.decoder, width=CLIP.width)
    arrays, model = built(c)
    assert "image/adapter/projection/kernel" not in arrays
    x = np.random.default_rng(1).normal(size=(2, 9, CLIP.width)).astype(np.float32)
    with torch.no_grad():
        theirs = Reference(c, arrays).resampled(torch.tensor(x)).numpy()
    np.testing.assert_allclose(
        jax.jit(type(model.image.adapter).__call__)(model.image.adapter, (x, None)),
        theirs,
        rtol=0,
        atol=2e-5 * np.abs(theirs).max(),
    )


def test_a_resampler_of_pictures_of_any_shape():
    """Keys have the places of their own grids, and rows without a patch are not read."""
    shapes = [(2, 5), (3, 3), (1, 7)]
    c = config("resampler", heads=2, queries=4, adaptive=True)
    c.image.encoders[0].class_token, c.image.encoders[0].budget = False, 12
    c.image.encoders[0].position_resize, c.image.fit = "bicubic_antialias", "slices"
    c.validate()
    arrays, model = built(c)
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 12, CLIP.width)).astype(np.float32)
    media = np.stack([in_patches(np.zeros((8 * h, 8 * w, 3), np.uint8), 8, 12) for h, w in shapes])
    call = jax.jit(lambda adapter, x: adapter((x, Grids.of(media))))
    ours = call(model.image.adapter, x)
    for i, (height, width) in enumerate(shapes):
        with torch.no_grad():
            features = torch.tensor(x[i : i + 1, : height * width])
            theirs = Reference(c, arrays).resampled(features, (height, width))[0].numpy()
        np.testing.assert_allclose(ours[i], theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_dropout_reaches_the_layer_that_reads_two_encoders():
    c = config("concat", heads=2, mlp=48, width=16)
    _, model = built(c)
    features = tuple(jnp.ones((2, encoder.rows, encoder.width)) for encoder in c.image.encoders)
    call = jax.jit(lambda adapter, key: adapter(features, key))
    plain, dropped = call(model.image.adapter, None), call(model.image.adapter, jax.random.key(0))
    assert np.abs(plain - dropped).max() > 1e-3


def mixed(combination, encoder, images, remat="none"):
    return mix.mixed(combination, encoder, images, remat)


def naive(combination, encoder, images):
    """The mix with every hidden state at hand."""
    seen = jax.vmap(encoder.features)(encoder.hidden_states(images))[combination.skipped :]
    layers = [jax.tree.map(lambda a, n=n: a[n], combination.layers) for n in range(len(seen))]
    return sum(layer(combination.norm, state) for layer, state in zip(layers, seen, strict=True))


@pytest.mark.parametrize(("settings", "trained"), [(SUMS[0], False), (SUMS[1], False), (SUMS[1], True)])
def test_gradients_of_the_mix(settings, trained):
    """With the encoder frozen, whose pass is repeated, and with the encoder trained."""
    _, model = built(config(**settings))
    combination, encoder = model.image.adapter.mixes[1], model.image.encoders[1]
    pixels = images(config(**settings))[1][:, 0]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 16)).astype(np.float32))

    def loss(f):
        return (
            (lambda m, e: (f(m, e, pixels) * weights).sum())
            if trained
            else (lambda m: (f(m, encoder, pixels) * weights).sum())
        )

    given = (combination, encoder) if trained else (combination,)
    for which in range(len(given)):
        ours = jax.tree.leaves(jax.jit(jax.grad(loss(functools.partial(mixed, remat="full")), which))(*given))
        theirs = jax.tree.leaves(jax.jit(jax.grad(loss(naive), which))(*given))
        assert len(ours) == len(theirs) > 3
        largest = max(np.abs(b).max() for b in theirs)
        for a, b in zip(ours, theirs, strict=True):  # that of a key's bias is zero but for rounding
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1e-3 * largest))


def test_gradients_of_an_encoder_of_which_a_part_is_trained():
    """One parameter is enough for the pass back through it; the others get none."""
    c = config(**SUMS[0])
    arrays, model = built(c)
    combination, pixels = model.image.adapter.mixes[1], images(c)[1][:, 0]
    tower = {
        path.removeprefix("image/encoders/1/"): jnp.asarray(a)
        for path, a in arrays.items()
        if path.startswith("image/encoders/1/")
    }
    trained = {"layers/norm1/scale": tower.pop("layers/norm1/scale")}

    def loss(f):
        return lambda given: (
            f(combination, nnx.with_parameters(model.image.encoders[1], {**tower, **given}), pixels) ** 2
        ).sum()

    ours, theirs = (jax.jit(jax.grad(loss(f)))(trained)["layers/norm1/scale"] for f in (mixed, naive))
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with gradient"])
def test_the_mix_keeps_no_stack_of_hidden_states(gradient):
    """Temporary memory, as the compiler counts it, of a deep encoder with many patches."""
    encoder = EncoderConfig(image_size=128, patch=8, width=64, layers=24, heads=1, mlp=64)
    stack = (
        (encoder.layers + 1) * 4 * (1 + encoder.patches) * encoder.width * 4
    )  # bytes of all hidden states of four pictures

    def make():
        return mix.Mix(encoder, adapter("sum"), 64, rngs=nnx.Rngs(0)), VisionTransformer(
            encoder, rngs=nnx.Rngs(0)
        )

    combination, tower = nnx.eval_shape(make)
    pixels = jax.ShapeDtypeStruct((4, 128, 128, 3), np.uint8)

    def bytes_of(f):
        loss = lambda combination, tower, pixels: (f(combination, tower, pixels) ** 2).sum()
        program = jax.grad(loss) if gradient else loss
        return (
            jax.jit(program).lower(combination, tower, pixels).compile().memory_analysis().temp_size_in_bytes
        )

    ours, theirs = bytes_of(mixed), bytes_of(naive)
    assert theirs > stack, "the plain form does keep them"
    assert ours < stack, f"{ours:,} bytes, {theirs:,} in the plain form, of which {stack:,} are hidden states"


def test_every_kind_is_tested():
    assert {a["kind"] for a in (*ONE, *TWO)} | {"transformer"} == set(ADAPTERS.names())
