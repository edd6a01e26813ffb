"""Lion and Muon, against their formulas and against Optax on the matrix of one layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.training.optimizer import make_optimizer

RATE, DECAY, BETA2, STEPS = 0.02, 0.3, 0.9, 3
# Shapes, and the matrix [in, out] of one layer where the parameter is a matrix of a hidden layer
MATRICES = {
    "decoder/layers/attention/query/kernel": ((2, 6, 2, 2, 4), (6, 16)),
    "decoder/layers/attention/out/kernel": ((2, 2, 2, 4, 6), (16, 6)),
    "decoder/layers/feed_forward/up/kernel": ((2, 6, 10), (6, 10)),
    "image/adapter/linear/kernel": ((6, 8), (6, 8)),
    "image/adapter/layer/attention/out/kernel": ((2, 3, 6), (6, 6)),
    "image/adapter/mixes/0/layers/kernel": ((3, 6, 4), (6, 4)),
}
OTHERS = {
    "decoder/embed": (9, 6),
    "decoder/head": (6, 9),
    "decoder/layers/norm1/scale": (2, 6),
    "decoder/layers/attention/query/bias": (2, 2, 2, 4),
    "image/encoders/0/patch/kernel": (2, 2, 3, 6),
    "image/adapter/queries": (5, 6),
    "special/user": (6,),
}
SHAPES = {path: shape for path, (shape, _) in MATRICES.items()} | OTHERS
DECAYED = {*MATRICES, "decoder/embed", "decoder/head", "image/encoders/0/patch/kernel"}


def run(name, **more):
    """(parameters before, gradients, parameters after) of a few steps."""
    rng = np.random.default_rng(0)
    draw = lambda: {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    start, gradients = draw(), [draw() for _ in range(STEPS)]
    settings = {"clip": None, "warmup": 0.0, "schedule": "constant", "weight_decay": DECAY, **more}
    c = OptimizerConfig(name=name, learning_rate=RATE, **settings)
    c.validate()
    optimizer = make_optimizer(c, 10, ((".*", 1.0),))
    ours, state, update = start, optimizer.init(start), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
    return start, gradients, ours


def theirs(rule, start, gradients):
    state = rule.init(start)
    for gradient in gradients:
        updates, state = rule.update(gradient, state, start)
        start = optax.apply_updates(start, updates)
    return start


def test_lion_is_the_published_one():
    start, gradients, ours = run("lion")
    for path, x in start.items():
        moment = np.zeros_like(x)
        for gradient in gradients:
            g = gradient[path]
            step = np.sign(0.9 * moment + 0.1 * g) + (path in DECAYED) * DECAY * x
            x, moment = x - RATE * step, 0.99 * moment + 0.01 * g
        np.testing.assert_allclose(ours[path], x, rtol=0, atol=1e-6, err_msg=path)


@pytest.fixture(scope="module")
def muon():
    return run("muon", beta2=BETA2)


@pytest.mark.parametrize("path", MATRICES)
def test_muon_is_that_of_optax_on_the_matrix_of_each_layer(path, muon):
    start, gradients, ours = muon
    _, matrix = MATRICES[path]
    layers = lambda a: jnp.asarray(a[path]).reshape(-1, *matrix)
    rule = optax.contrib.muon(RATE, weight_decay=DECAY, consistent_rms=0.2)
    for layer, found in enumerate(layers(ours)):
        expected = theirs(rule, layers(start)[layer], [layers(gradient)[layer] for gradient in gradients])
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6, err_msg=f"layer {layer}")


def test_an_update_of_muon_is_nearly_orthogonal_and_as_large_as_adamw_s(muon):
    start, gradients, _ = muon
    path = "decoder/layers/attention/query/kernel"
    optimizer = make_optimizer(
        OptimizerConfig(name="muon", learning_rate=1.0, clip=None, warmup=0.0), 10, ((".*", 1.0),)
    )
    updates, _ = optimizer.update(gradients[0], optimizer.init(start), start)
    for update, gradient in zip(updates[path], gradients[0][path], strict=True):
        u, _, v = np.linalg.svd(gradient.reshape(6, 16), full_matrices=False)
        sizes = np.diag(u.T @ -np.asarray(update).reshape(6, 16) @ v.T) / (0.2 * 16**0.5)
        assert sizes.min() > 0.6 and sizes.max() < 1.3


@pytest.mark.parametrize("path", OTHERS)
def test_what_is_no_hidden_matrix_learns_by_adamw(path, muon):
    start, gradients, ours = muon
    rule = optax.adamw(RATE, b2=BETA2, weight_decay=DECAY * (path in DECAYED))
    expected = theirs(rule, start[path], [gradient[path] for gradient in gradients])
    np.testing.assert_allclose(ours[path], expected, rtol=0, atol=1e-6)
