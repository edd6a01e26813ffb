"""Dropout of the adapter: with explicit keys in training, never in inference."""

import jax
import numpy as np
import tiny

from omnifusion_jax.batch import FEATURE, Batch
from omnifusion_jax.models.adapters import drop
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx


def model():
    c = tiny.config()
    return c, nnx.with_parameters(abstract(c), tiny.arrays(c, "encoders", "adapter", "special", "decoder"))


def test_a_key_decides_what_is_dropped_and_none_drops_nothing():
    c, m = model()
    assert c.adapter.dropout == 0.1
    x = np.random.default_rng(0).normal(size=(2, 9, c.encoder.embed)).astype(np.float32)
    plain, a, b = m.adapter(x), m.adapter(x, jax.random.key(1)), m.adapter(x, jax.random.key(2))
    np.testing.assert_array_equal(m.adapter(x), plain)
    np.testing.assert_array_equal(m.adapter(x, jax.random.key(1)), a)
    assert np.abs(a - plain).max() > 1e-3 and np.abs(a - b).max() > 1e-3
    assert np.abs(a[0] - b[0]).max() > 1e-3  # each sample for itself


def test_a_tenth_is_dropped_and_the_rest_scaled():
    y = np.asarray(drop(np.ones((200, 500), np.float32), 0.1, jax.random.key(0)))
    assert abs((y == 0).mean() - 0.1) < 0.005
    np.testing.assert_allclose(y[y > 0], 1 / 0.9, rtol=1e-6)


def test_logits_are_without_dropout_and_training_is_not():
    c, m = model()
    n = c.encoder.rows
    plane = np.zeros((1, n), np.int32)
    images = (tiny.image(c)[None],)
    batch = Batch(plane, plane + FEATURE, np.arange(n, dtype=np.int32)[None], plane.astype(np.float32), plane + 1, np.arange(n)[None], images)
    np.testing.assert_array_equal(m(batch), m.decoder.logits(m.hidden(batch)))
    assert np.abs(m.hidden(batch, jax.random.key(0)) - m.hidden(batch)).max() > 1e-3
