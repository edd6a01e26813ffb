"""Where float32 is promised it is float32, whatever the type of weights and activations: against NumPy in
float64 on the same bfloat16 numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnifusion_jax.batch import TEXT, Batch
from omnifusion_jax.config import adapter
from omnifusion_jax.models.adapters.mix import LayerMap
from omnifusion_jax.models.adapters.transformer import TransformerAdapter
from omnifusion_jax.models.decoder import Decoder
from omnifusion_jax.models.omnifusion import OmniFusion, abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import attend
from omnifusion_jax.nn.norms import HeadsNorm, LayerNorm, RMSNorm
from omnifusion_jax.nn.rotary import frequencies, over_grid, over_text

ROUNDING = 2.0**-7  # between neighbouring numbers of bfloat16, relative to the power of two below


def half(a):
    return jnp.asarray(a, jnp.bfloat16)


def wide(a):
    return np.asarray(a, np.float64)


def rounded_once(y, expected):
    """Whether y is the bfloat16 nearest to `expected`, but for a few that lie half-way. More than one
    rounding would miss many."""
    assert y.dtype == jnp.bfloat16
    return (np.asarray(y) == np.asarray(half(expected))).mean() > 0.995


@pytest.mark.parametrize("start", [0, 4000, 30_000])
def test_rotary_angles(start):
    """In bfloat16 a position of 4000 would be off by up to 8, more than a whole turn."""
    rng = np.random.default_rng(0)
    x, positions = half(rng.normal(size=(1, 2, 50, 16))), start + np.arange(50)[None]
    angle = positions[..., None] * 10000.0 ** -(np.arange(8) / 8)
    turn = np.exp(1j * angle)[:, None]
    turned = (wide(x)[..., :8] + 1j * wide(x)[..., 8:]) * turn
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    y = over_text(jnp.asarray(positions), frequencies(8, 10000.0), x.dtype)(x)
    assert y.dtype == jnp.bfloat16
    largest = np.abs(turned)[..., None].max(axis=-1)
    assert (np.abs(wide(y) - expected) <= 2 * ROUNDING * np.concatenate([largest, largest], axis=-1)).all()


def test_rotary_angles_of_patches():
    """In bfloat16 a place beyond 32, of the grid that was trained, would be off by up to 1/8."""
    side, trained = 60, 37
    x = half(np.random.default_rng(0).normal(size=(1, 2, 1 + side**2, 8)))
    row, column = np.divmod(np.arange(side**2), side) / np.array(side / trained)
    bands = 10000.0 ** -(np.arange(2) / 2)
    angle = np.concatenate([row[:, None] * bands, column[:, None] * bands], axis=-1)
    turned = (wide(x)[:, :, 1:, 0::2] + 1j * wide(x)[:, :, 1:, 1::2]) * np.exp(1j * angle)
    expected = np.stack([turned.real, turned.imag], axis=-1)
    y = over_grid(side, trained, 10000.0, 1, 8, x.dtype)(x)
    assert y.dtype == jnp.bfloat16 and (y[:, :, 0] == x[:, :, 0]).all()
    found = wide(y)[:, :, 1:].reshape(expected.shape)
    assert (np.abs(found - expected) <= 2 * ROUNDING * np.abs(turned)[..., None]).all()


NORMS = {
    "layer": (
        lambda: LayerNorm(512, 1e-5),
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5),
    ),
    "rms": (lambda: RMSNorm(512, 1e-5), lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)),
}


@pytest.mark.parametrize("mean", [0.0, 8.0])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, mean):
    make, formula = NORMS[name]
    norm = jax.tree.map(half, make())
    x = half(np.random.default_rng(1).normal(size=(64, 512)) + mean)
    assert rounded_once(norm(x), formula(wide(x)))


def test_the_norm_of_queries_and_keys():
    norm = jax.tree.map(half, HeadsNorm(4, 64, 1e-6))
    x = half(np.random.default_rng(1).normal(size=(3, 4, 20, 64)))
    assert rounded_once(norm(x), wide(x) / np.sqrt((wide(x) ** 2).mean((1, 3), keepdims=True) + 1e-6))


def softmax(scores):
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def test_attention_scores():
    """Scores around 50 that differ by less than what bfloat16 tells apart there, 0.25."""
    rng = np.random.default_rng(2)
    base = rng.normal(size=64)
    q = half(20 * base / np.linalg.norm(base) + 0.1 * rng.normal(size=(1, 2, 3, 4, 64)))
    k = half(20 * base / np.linalg.norm(base) + 0.1 * rng.normal(size=(1, 2, 30, 64)))
    v = half(np.broadcast_to(np.eye(30), (1, 2, 30, 30)))  # what comes out is the probabilities
    scores = np.einsum("bkgtd,bksd->bkgts", wide(q), wide(k)) / 8
    assert np.abs(scores).max() > 40
    y = attend(q, k, v)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(y), softmax(scores), rtol=0.02)


def test_attention_scores_of_the_adapter():
    """The same holds for its layer.

    Queries and keys are what comes in, values what is left of that without its common part.
    """
    c = tiny.config()
    c.image.adapter.heads, width = 1, c.image.encoders[0].width
    rng = np.random.default_rng(3)
    base = rng.normal(size=width)
    base /= np.linalg.norm(base)
    x = half(17 * base + 0.1 * rng.normal(size=(1, 9, width)))
    empty = nnx.eval_shape(lambda: TransformerAdapter(c.image, c.decoder.width, rngs=nnx.Rngs(0)))
    p = {path: np.zeros(a.shape) for path, a in nnx.parameters(empty).items()}
    ours = "layer/attention/{}/kernel".format
    p[ours("query")][:, 0] = p[ours("key")][:, 0] = p[ours("out")][0] = np.eye(width)
    p[ours("value")][:, 0] = np.eye(width) - np.outer(base, base)
    module = nnx.with_parameters(empty, {path: half(a) for path, a in p.items()})
    values = wide(half(wide(x) @ wide(module.layer.attention.value.kernel[...])[:, 0]))
    expected = softmax(wide(x) @ wide(x).swapaxes(1, 2) / width**0.5) @ values
    y, _ = module.layer.attention(x)
    assert y.dtype == jnp.bfloat16
    assert np.sqrt(((wide(y) - expected) ** 2).mean() / (expected**2).mean()) < 0.01


def test_what_a_layer_adds_to_the_mix():
    """One share of a sum over all layers: what is rounded here is rounded 25 times."""
    rng = np.random.default_rng(5)
    layer = LayerMap(adapter("sum"), 64, 32, states=4, rngs=nnx.Rngs(0))
    layer = nnx.with_parameters(
        layer, {path: half(rng.normal(size=a.shape)) for path, a in nnx.parameters(layer).items()}
    )
    x, plain = half(rng.normal(size=(2, 7, 64))), lambda state: state
    y = layer(plain, x)
    expected = wide(layer.weight[...]) * (wide(x) @ wide(layer.kernel[...]) + wide(layer.bias[...]))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())


def test_logits():
    c = tiny.config().decoder
    decoder = nnx.with_parameters(
        nnx.eval_shape(lambda: Decoder(c, rngs=nnx.Rngs(0))),
        {path.removeprefix("decoder/"): half(a) for path, a in tiny.arrays(tiny.config(), "decoder").items()},
    )
    x = half(np.random.default_rng(4).normal(size=(5, c.width)))
    logits = decoder.logits(x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, wide(x) @ wide(decoder.head[...]), rtol=0, atol=1e-5)


def test_a_model_computes_in_its_type_though_the_table_of_embeddings_is_float32():
    """So a training step holds it; its rows are cast where they are read, and nothing after them is float32
    by accident."""
    c = tiny.config()
    arrays = {
        path: jnp.asarray(a, jnp.float32 if path == "decoder/embed" else jnp.bfloat16)
        for path, a in tiny.arrays(c).items()
    }
    model = nnx.with_parameters(abstract(c), arrays)
    plane = jnp.ones((1, 5), jnp.int32)
    pictures = jnp.asarray(tiny.image(c))[None]
    batch = Batch(plane, plane * TEXT, plane, plane, plane, plane, plane[:, 0], {"image": (pictures,)})
    for f in (OmniFusion.embed, OmniFusion.hidden):
        assert jax.eval_shape(f, model, batch).dtype == jnp.bfloat16
    assert jax.eval_shape(OmniFusion.__call__, model, batch).dtype == jnp.float32
    for encoder in model.image.encoders:
        assert jax.eval_shape(type(encoder).__call__, encoder, pictures[:, 0]).dtype == jnp.bfloat16
