"""Dropout of the adapter: with explicit keys in training, as PyTorch has it there, never in inference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnifusion_jax.batch import FEATURE, Batch
from omnifusion_jax.config import ImageConfig, adapter
from omnifusion_jax.models.adapters.transformer import TransformerAdapter
from omnifusion_jax.models.omnifusion import OmniFusion, abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.dropout import drop


def model():
    c = tiny.config()
    return c, nnx.with_parameters(abstract(c), tiny.arrays(c))


ADAPT = jax.jit(TransformerAdapter.__call__)


def test_a_key_decides_what_is_dropped_and_none_drops_nothing():
    c, m = model()
    assert c.image.adapter.dropout == 0.1
    x = (
        np.random.default_rng(0)
        .normal(size=(1, 9, c.image.encoders[0].width))
        .astype(np.float32)
        .repeat(2, axis=0)
    )
    plain, a, b = (
        ADAPT(m.image.adapter, x),
        ADAPT(m.image.adapter, x, jax.random.key(1)),
        ADAPT(m.image.adapter, x, jax.random.key(2)),
    )
    np.testing.assert_array_equal(plain[0], plain[1])
    np.testing.assert_array_equal(ADAPT(m.image.adapter, x, jax.random.key(1)), a)
    assert np.abs(a - plain).max() > 1e-3 and np.abs(a - b).max() > 1e-3
    assert np.abs(a[0] - a[1]).max() > 1e-3  # the same picture twice in a batch: each is dropped for itself


def test_a_tenth_is_dropped_and_the_rest_scaled():
    y = np.asarray(drop(np.ones((200, 500), np.float32), 0.1, jax.random.key(0)))
    assert abs((y == 0).mean() - 0.1) < 0.005
    np.testing.assert_allclose(y[y > 0], 1 / 0.9, rtol=1e-6)


WIDTH, HEADS, ROWS, DRAWS, RATE = 4, 2, 3, 40_000, 0.3
# Which kernels are zero, so that nothing is dropped behind them. A feed-forward part as wide as the layer:
# equal keys would give equal masks.
PLACES = {"attention": {"down"}, "feed-forward": {"out"}, "all": set()}


@pytest.mark.parametrize("place", PLACES)
def test_it_falls_where_pytorch_has_it(place):
    """Mean, spread and correlations of what comes out of the layer, over many draws, against the same layer
    of PyTorch in training mode."""
    torch = pytest.importorskip("torch")
    from parity.torch_models import layer_state

    encoder = dataclasses.replace(tiny.config().image.encoders[0], width=WIDTH, heads=1)
    c = ImageConfig((encoder,), adapter("transformer", heads=HEADS, mlp=WIDTH, dropout=RATE))
    empty = nnx.eval_shape(lambda: TransformerAdapter(c, WIDTH, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(5)
    factor = lambda path: 0.0 if bool(PLACES[place] & set(path.split("/"))) else 0.7
    p = {
        path: rng.normal(size=a.shape).astype(np.float32) * factor(path)
        for path, a in nnx.parameters(empty).items()
    }
    one, zero, matrix = (
        np.ones(WIDTH, np.float32),
        np.zeros(WIDTH, np.float32),
        np.eye(WIDTH, dtype=np.float32),
    )
    up, down = "layer/feed_forward/up", "layer/feed_forward/down"
    p |= {"linear/kernel": matrix, "linear/bias": zero, f"{up}/kernel": matrix, f"{up}/bias": one}
    p[f"{down}/kernel"] = matrix * (0 if "down" in PLACES[place] else 2)
    p |= {f"layer/norm{n}/{name}": a for n in (1, 2) for name, a in (("scale", one), ("bias", zero))}
    ours = nnx.with_parameters(empty, {path: jnp.asarray(a) for path, a in p.items()})
    x = np.repeat(rng.normal(size=(1, ROWS, WIDTH)).astype(np.float32), DRAWS, axis=0)

    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, dropout=RATE, batch_first=True).train()
    layer.load_state_dict(layer_state(p, "layer"))
    torch.manual_seed(0)
    with torch.no_grad():
        theirs = layer(torch.tensor(x)).numpy().reshape(DRAWS, -1)
        still = layer.eval()(torch.tensor(x[:1])).numpy()
    np.testing.assert_allclose(ADAPT(ours, x)[:1], still, atol=1e-5)
    ours = np.asarray(ADAPT(ours, x, jax.random.key(0))).reshape(DRAWS, -1)
    spread = theirs.std(axis=0)
    assert spread.min() > 0.05
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), rtol=0, atol=0.03 * spread.max())
    np.testing.assert_allclose(ours.std(axis=0), spread, rtol=0.03)
    np.testing.assert_allclose(np.corrcoef(ours.T), np.corrcoef(theirs.T), rtol=0, atol=0.03)


def test_logits_are_without_dropout_and_training_is_not():
    c, m = model()
    n = c.image.encoders[0].rows
    plane = np.zeros((1, n), np.int32)
    index, media = np.arange(n, dtype=np.int32)[None], {"image": (tiny.image(c)[None],)}
    batch = Batch(
        plane, plane + FEATURE, index, plane.astype(np.float32), plane + 1, index, plane[:, 0] + 1, media
    )
    hidden = jax.jit(OmniFusion.hidden)
    plain = hidden(m, batch)
    np.testing.assert_allclose(
        jax.jit(OmniFusion.__call__)(m, batch), m.decoder.logits(plain), rtol=0, atol=1e-5
    )
    assert np.abs(hidden(m, batch, jax.random.key(0)) - plain).max() > 1e-3
