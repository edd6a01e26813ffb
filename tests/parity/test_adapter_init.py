"""`adapter.init=torch` against PyTorch's own modules, each built many times: the same distribution of every
array, biases too."""

import functools

import jax
import numpy as np
import pytest
import torch
from parity.test_adapters import CLIP, DINO
from scipy.stats import ks_2samp
from torch.nn import LayerNorm, Linear, MultiheadAttention, TransformerEncoderLayer

from omnifusion_jax.config import ImageConfig, adapter
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import ADAPTERS

TIMES = 12
WIDTH, FIRST, SECOND, MLP, OUT = (
    16,
    32,
    24,
    40,
    48,
)  # of what is between, both encoders, what is inside, the decoder
STATES = (CLIP.layers + 1, DINO.layers + 1)


def layer(width):
    """The transformer layer, under our names."""
    one = TransformerEncoderLayer(width, 4, MLP)
    return {
        **projections("layer/attention", one.self_attn),
        **named("layer/feed_forward/up", *parts(one.linear1)),
        **named("layer/feed_forward/down", *parts(one.linear2)),
        **{
            f"layer/norm{n}/{ours}": getattr(norm, name)
            for n, norm in ((1, one.norm1), (2, one.norm2))
            for name, ours in NORM
        },
    }


NORM = (("weight", "scale"), ("bias", "bias"))
parts = lambda linear: (linear.weight, linear.bias)
named = lambda name, weight, bias: {f"{name}/kernel": weight, f"{name}/bias": bias}
linear = lambda name, width, out: named(name, *parts(Linear(width, out)))


def mixes():
    """A linear map for each layer of each encoder, and a norm an encoder; what the layers weigh is no module
    of PyTorch."""
    found = {}
    for i, (width, states) in enumerate(zip((FIRST, SECOND), STATES, strict=True)):
        maps, norm = [Linear(width, WIDTH) for _ in range(states)], LayerNorm(width)
        found |= {
            f"mixes/{i}/layers/kernel": torch.stack([m.weight for m in maps]),
            f"mixes/{i}/layers/bias": torch.stack([m.bias for m in maps]),
        }
        found |= {f"mixes/{i}/norm/{ours}": getattr(norm, name) for name, ours in NORM}
        found[f"mixes/{i}/layers/weight"] = torch.full((states,), 1 / states)
    return found


def projections(path, one: MultiheadAttention):
    found = named(f"{path}/out", *parts(one.out_proj))
    for name, *third in zip(
        ("query", "key", "value"), one.in_proj_weight.chunk(3), one.in_proj_bias.chunk(3), strict=True
    ):
        found |= named(f"{path}/{name}", *third)
    return found


def attention():
    queries = torch.randn(5, WIDTH) / WIDTH**0.5
    return {
        **mixes(),
        **projections("attention", MultiheadAttention(WIDTH, 4)),
        **linear("linear", WIDTH, OUT),
        "queries": queries,
    }


def resampler():
    matrices = {"projection/kernel": Linear(FIRST, OUT).weight, "linear/kernel": Linear(OUT, OUT).weight}
    norms = {
        f"{name}/{ours}": getattr(LayerNorm(OUT), of)
        for name in ("query_norm", "feature_norm", "norm")
        for of, ours in NORM
    }
    return {
        **projections("attention", MultiheadAttention(OUT, 4)),
        **matrices,
        **norms,
        "queries": torch.randn(4, OUT) / OUT**0.5,
    }


def concat():
    found = {**layer(WIDTH), **linear("linear", WIDTH, OUT)}
    for i, width in enumerate((FIRST, SECOND)):
        found |= linear(f"projections/{i}", width, WIDTH)
    return found


THEIRS = {
    "linear": lambda: linear("linear", FIRST, OUT),
    "mlp": lambda: {**linear("up", FIRST, MLP), **linear("linear", MLP, OUT)},
    "transformer": lambda: {**layer(FIRST), **linear("linear", FIRST, OUT)},
    "concat": concat,
    "sum": lambda: {**mixes(), **linear("linear", WIDTH, OUT)},
    "attention": attention,
    "resampler": resampler,
}


SETTINGS = {
    "linear": {},
    "mlp": {"mlp": MLP},
    "transformer": {"heads": 4, "mlp": MLP},
    "concat": {"width": WIDTH, "heads": 4, "mlp": MLP},
    "sum": {"width": WIDTH},
    "attention": {"width": WIDTH, "heads": 4, "queries": 5},
    "resampler": {"heads": 4, "queries": 4},
}


def config(kind, init):
    return ImageConfig((CLIP, DINO)[: ADAPTERS[kind].encoders], adapter(kind, init=init, **SETTINGS[kind]))


@functools.cache
def ours(kind, init):
    """Every array by path, [TIMES, ...]: one drawing for each of so many seeds."""
    make = lambda key: nnx.parameters(ADAPTERS[kind](config(kind, init), OUT, rngs=nnx.Rngs(key)))
    key = jax.random.key(0, impl="unsafe_rbg")  # XLA takes long to compile the default's code
    return jax.device_get(jax.jit(jax.vmap(make))(jax.random.split(key, TIMES)))


@pytest.mark.parametrize("kind", ADAPTERS.names())
def test_every_array_is_drawn_as_in_pytorch(kind):
    torch.manual_seed(0)
    theirs = [THEIRS[kind]() for _ in range(TIMES)]
    mine = ours(kind, "torch")
    assert set(mine) == set(theirs[0])
    for path, drawn in mine.items():
        a, b = drawn.ravel(), torch.stack([arrays[path].detach() for arrays in theirs]).numpy().ravel()
        assert a.size == b.size, path
        if b.std() < 1e-6:  # ones, zeros, equal weights
            np.testing.assert_allclose(a, b, atol=1e-7, err_msg=path)
            continue
        assert ks_2samp(a, b).pvalue > 1e-3, path
        if path != "queries":  # those are normal; the others have an end, of which both come close
            np.testing.assert_allclose(
                np.abs(a).max(), np.abs(b).max(), rtol=0.03 if a.size > 400 else 0.1, err_msg=path
            )


def test_published_bounds():
    """Of the transformer adapter, by the formulas: 1 / sqrt(fan_in), and Xavier's over the packed matrix of
    queries, keys and values."""
    attention, up, down = (f"layer/{name}" for name in ("attention", "feed_forward/up", "feed_forward/down"))
    bounds = {f"{attention}/{name}/kernel": (6 / (4 * FIRST)) ** 0.5 for name in ("query", "key", "value")}
    bounds |= {f"{attention}/{name}/bias": 0 for name in ("query", "key", "value", "out")}
    bounds |= {
        f"{attention}/out/kernel": FIRST**-0.5,
        "linear/kernel": FIRST**-0.5,
        "linear/bias": FIRST**-0.5,
    }
    bounds |= {
        f"{up}/kernel": FIRST**-0.5,
        f"{up}/bias": FIRST**-0.5,
        f"{down}/kernel": MLP**-0.5,
        f"{down}/bias": MLP**-0.5,
    }
    for path, bound in bounds.items():
        drawn = ours("transformer", "torch")[path]
        assert 0.97 * bound <= np.abs(drawn).max() <= bound * (1 + 1e-6), path
        np.testing.assert_allclose(drawn.std(), bound / 3**0.5, rtol=0.08, err_msg=path)


def test_the_default_is_normal_with_biases_of_zero():
    found = ours("transformer", "normal")
    assert not any(a.any() for path, a in found.items() if path.endswith("bias"))
    np.testing.assert_allclose(found["layer/feed_forward/up/kernel"].std(), FIRST**-0.5, rtol=0.1)
    np.testing.assert_allclose(found["layer/feed_forward/down/kernel"].std(), MLP**-0.5, rtol=0.1)
    assert np.abs(found["layer/feed_forward/up/kernel"]).max() > 2.5 * FIRST**-0.5


def test_draws_are_not_repeated():
    """Neither from array to array nor from layer to layer."""
    found = ours("attention", "torch")
    layers = (*found["mixes/0/layers/kernel"][0], *found["mixes/0/layers/bias"][0])
    flat = [
        a.ravel()[:16]
        for a in (*(found[f"attention/{name}/kernel"][0] for name in ("query", "key", "value")), *layers)
    ]
    normed = [a / np.abs(a).max() for a in flat]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(normed) for b in normed[:i])
