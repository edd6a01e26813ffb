"""`adapter.init=torch` against PyTorch's own modules, each built many times: the same distribution of every
array, biases too."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
import torch
from parity.test_adapters import CLIP, DINO
from scipy.stats import ks_2samp
from torch.nn import LayerNorm, Linear, MultiheadAttention, TransformerEncoderLayer

from omnifusion_jax.config import AdapterConfig
from omnifusion_jax.models.adapters import ADAPTERS
from omnifusion_jax.nn import nnx

TIMES = 12
WIDTH, FIRST, SECOND, MLP, OUT = 16, 32, 24, 40, 48  # of what is between, both encoders, what is inside, the decoder
STATES = (CLIP.layers + 1, DINO.layers + 1)


def layer(width):
    """The transformer layer, under our names."""
    one = TransformerEncoderLayer(width, 4, MLP)
    return {
        **named("qkv", one.self_attn.in_proj_weight, one.self_attn.in_proj_bias),
        **named("out", *parts(one.self_attn.out_proj)),
        **named("up", *parts(one.linear1)),
        **named("down", *parts(one.linear2)),
        **{f"norm{n}/{ours}": getattr(norm, name) for n, norm in ((1, one.norm1), (2, one.norm2)) for name, ours in NORM},
    }


NORM = (("weight", "scale"), ("bias", "bias"))
parts = lambda linear: (linear.weight, linear.bias)
named = lambda name, weight, bias: {name: weight, f"{name}_bias": bias}
linear = lambda name, width, out: named(name, *parts(Linear(width, out)))


def mixes():
    """A linear map for each layer of each encoder, and a norm an encoder; what the layers weigh is no module
    of PyTorch."""
    found = {}
    for i, (width, states) in enumerate(zip((FIRST, SECOND), STATES, strict=True)):
        maps, norm = [Linear(width, WIDTH) for _ in range(states)], LayerNorm(width)
        found |= {f"mixes/{i}/layers/kernel": torch.stack([m.weight for m in maps]), f"mixes/{i}/layers/bias": torch.stack([m.bias for m in maps])}
        found |= {f"mixes/{i}/norm/{ours}": getattr(norm, name) for name, ours in NORM}
        found[f"mixes/{i}/layers/weight"] = torch.full((states,), 1 / states)
    return found


def attention():
    one = MultiheadAttention(WIDTH, 4)
    third = dict(zip(("query", "key", "value"), one.in_proj_weight.chunk(3), strict=True))
    rest = {f"{name}_bias": torch.zeros(WIDTH) for name in third}
    queries = torch.randn(5, WIDTH) / WIDTH**0.5
    return {**mixes(), **third, **rest, **named("out", *parts(one.out_proj)), **linear("linear", WIDTH, OUT), "queries": queries}


def concat():
    found = {**layer(WIDTH), **linear("linear", WIDTH, OUT)}
    for i, width in enumerate((FIRST, SECOND)):
        found |= dict(zip((f"projections/{i}/kernel", f"projections/{i}/bias"), parts(Linear(width, WIDTH)), strict=True))
    return found


THEIRS = {
    "linear": lambda: linear("linear", FIRST, OUT),
    "mlp": lambda: {**linear("up", FIRST, MLP), **linear("linear", MLP, OUT)},
    "transformer": lambda: {**layer(FIRST), **linear("linear", FIRST, OUT)},
    "concat": concat,
    "sum": lambda: {**mixes(), **linear("linear", WIDTH, OUT)},
    "attention": attention,
}


def config(kind, init):
    two = kind in ("concat", "sum", "attention")
    adapter = AdapterConfig(kind, heads=4, mlp=MLP, init=init, **({"width": WIDTH, "queries": 5} if two else {}))
    base = tiny.config()
    return dataclasses.replace(
        base, encoder=CLIP, encoder2=DINO if two else None, adapter=adapter, decoder=dataclasses.replace(base.decoder, embed=OUT)
    )


@functools.cache
def ours(kind, init):
    """Every array by path, [TIMES, ...]: one drawing for each of so many seeds."""
    make = lambda key: nnx.parameters(ADAPTERS[kind](config(kind, init), rngs=nnx.Rngs(params=key)))
    key = jax.random.key(0, impl="unsafe_rbg")  # XLA takes long to compile the default's code
    return jax.device_get(jax.jit(jax.vmap(make))(jax.random.split(key, TIMES)))


@pytest.mark.parametrize("kind", ADAPTERS)
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
            np.testing.assert_allclose(np.abs(a).max(), np.abs(b).max(), rtol=0.03 if a.size > 400 else 0.1, err_msg=path)


def test_published_bounds():
    """Of the transformer adapter, by the formulas: 1 / sqrt(fan_in), and Xavier's over the packed matrix of
    queries, keys and values."""
    bounds = {"qkv": (6 / (4 * FIRST)) ** 0.5, "out": FIRST**-0.5, "up": FIRST**-0.5, "up_bias": FIRST**-0.5, "linear_bias": FIRST**-0.5}
    bounds |= {"down": MLP**-0.5, "down_bias": MLP**-0.5, "linear": FIRST**-0.5, "qkv_bias": 0, "out_bias": 0}
    for path, bound in bounds.items():
        drawn = ours("transformer", "torch")[path]
        assert 0.97 * bound <= np.abs(drawn).max() <= bound * (1 + 1e-6), path
        np.testing.assert_allclose(drawn.std(), bound / 3**0.5, rtol=0.08, err_msg=path)


def test_the_default_is_normal_with_biases_of_zero():
    found = ours("transformer", "normal")
    assert not any(a.any() for path, a in found.items() if path.endswith("bias"))
    np.testing.assert_allclose(found["up"].std(), FIRST**-0.5, rtol=0.1)
    np.testing.assert_allclose(found["down"].std(), MLP**-0.5, rtol=0.1)
    assert np.abs(found["up"]).max() > 2.5 * FIRST**-0.5


def test_draws_are_not_repeated():
    """Neither from array to array nor from layer to layer."""
    found = ours("attention", "torch")
    layers = (*found["mixes/0/layers/kernel"][0], *found["mixes/0/layers/bias"][0])
    flat = [a.ravel()[:16] for a in (found["query"][0], found["key"][0], found["value"][0], *layers)]
    normed = [a / np.abs(a).max() for a in flat]
    assert all(np.abs(a - b).max() > 1e-3 for i, a in enumerate(normed) for b in normed[:i])
