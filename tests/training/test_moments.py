"""Moments in bfloat16 and in 8 bits: where they go, and that they follow those in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from omnifusion_jax import sharding
from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.training.moments import Blocks, Kept, from_int8, noise, to_bfloat16, to_int8
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.step import init_state, state_shardings

UP, NORM = "decoder/layers/feed_forward/up/kernel", "decoder/norm/scale"
SEED = jnp.uint32(1)


def optimizer(moments, name="adamw"):
    settings = {"clip": None, "warmup": 0.0, "schedule": "constant"}
    return make_optimizer(OptimizerConfig(name=name, moments=moments, **settings), 10, ((".*", 1.0),))


def spread(rng, shape):
    """Numbers of both signs over six decimal places, as gradients are."""
    return (rng.normal(size=shape) * 10 ** rng.uniform(-6, 0, shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("keep", "error"), [(to_bfloat16, 2**-7), (lambda x, seed: from_int8(to_int8(x, seed)), 0.2)]
)
def test_a_number_becomes_a_neighbour_and_stays_itself_on_average(keep, error):
    x = spread(np.random.default_rng(0), (4, 256)) * np.float32([[1e-6], [1e-4], [1e-2], [1]])
    drawn = jax.vmap(lambda seed: keep(x, seed).astype(jnp.float32))(jax.random.bits(jax.random.key(1), 4000))
    largest = np.abs(x).reshape(4, 2, 128).max(axis=-1).repeat(128, axis=-1)
    upper = np.abs(x) > 1e-3 * largest
    assert (np.abs(drawn - x) <= error * np.abs(x))[:, upper].all()
    assert (np.sign(drawn) == np.sign(x)).all()
    mean = np.asarray(drawn, np.float64).mean(axis=0)
    np.testing.assert_allclose(mean[upper], x[upper], rtol=error / 10)


def test_zeros_and_the_largest_number_are_exact():
    x = np.zeros((3, 256), np.float32)
    x[1, 7], x[2, 200] = 3.0, -1e-30
    for seed in jnp.arange(20, dtype=jnp.uint32):
        np.testing.assert_allclose(from_int8(to_int8(x, seed)), x, rtol=1e-6)


def test_blocks_have_scales_of_their_own():
    x = np.ones((2, 3, 256), np.float32)
    x[..., 128:] = 1e-9
    packed = to_int8(x, SEED)
    assert packed.codes.dtype == jnp.int8 and packed.scales.shape == (2, 3, 2)
    np.testing.assert_allclose(from_int8(packed), x, rtol=1e-6)
    assert to_int8(x[..., :100], SEED).scales.shape == (2, 3, 1)  # no multiple of a block: the whole row


@pytest.mark.parametrize(("moments", "error"), [("bfloat16", 0.05), ("int8", 0.25)])
def test_second_moments_follow_those_in_float32(moments, error):
    """The gradient falls to a tenth: rounded to the nearest bfloat16, its mean of squares would stay."""
    params = {UP: jnp.zeros((2, 16, 128))}
    bank = jnp.asarray(np.random.default_rng(0).normal(size=(32, *params[UP].shape)), jnp.float32)

    def run(moments):
        rule = optimizer(moments)

        def step(state, i):
            gradient = bank[i % 32] * jnp.where(i < 100, 1, 0.1)
            updates, state = rule.update({UP: gradient}, state, params)
            return state, updates[UP]

        state, _ = jax.lax.scan(step, rule.init(params), jnp.arange(2968))
        return jax.lax.scan(step, state, jnp.arange(2968, 3000))[1]

    exact, found = (np.asarray(jax.jit(run, static_argnums=0)(kind)) for kind in ("float32", moments))
    assert np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)) < error
    np.testing.assert_allclose(np.abs(found).mean(), np.abs(exact).mean(), rtol=error / 3)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
@pytest.mark.parametrize(("moments", "size"), [("bfloat16", 2), ("int8", 1 + 4 / 128)])
def test_bytes_of_moments(name, moments, size):
    """Of large parameters; small ones stay in float32."""
    params = {
        UP: jax.ShapeDtypeStruct((2, 64, 256), np.float32),
        NORM: jax.ShapeDtypeStruct((64,), np.float32),
    }
    state = jax.eval_shape(lambda p: optimizer(moments, name).init(p), params)
    used = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state) if a.ndim)
    kernel, norm = (int(np.prod(a.shape)) for a in params.values())
    count = {"adamw": (2, 2), "lion": (1, 1), "muon": (1, 2)}[name]
    table = 12 if name == "muon" else 0  # its coefficients
    assert used == count[0] * kernel * size + count[1] * norm * 4 + table


def test_packed_moments_lie_as_their_parameters_do():
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    params = {UP: jax.ShapeDtypeStruct((2, 64, 512), np.float32)}
    state = jax.eval_shape(lambda p: init_state(optimizer("int8"), p), params)
    placed = state_shardings(mesh, state)
    found = [b for b in jax.tree.leaves(placed.optimizer, is_leaf=lambda a: isinstance(a, Blocks))]
    packed = [b for b in found if isinstance(b, Blocks)]
    spec = PartitionSpec(None, "fsdp", "tensor")
    assert len(packed) == 2 and all(b.codes.spec == b.scales.spec == spec for b in packed)
    assert all(b.spec == PartitionSpec() for b in found if not isinstance(b, Blocks))


def test_the_same_steps_round_the_same_way():
    """So a resumed run goes on as if it had not stopped; and every step draws anew."""
    params = {UP: jnp.zeros((2, 64, 256))}
    gradient = {UP: jnp.asarray(spread(np.random.default_rng(0), (2, 64, 256)))}
    rule = optimizer("bfloat16")
    update = jax.jit(rule.update)
    state = rule.init(params)
    later = tuple(part._replace(count=part.count + 1) if isinstance(part, Kept) else part for part in state)
    first, again, other = (update(gradient, one, params)[1] for one in (state, state, later))
    moments = lambda state: [a for a in jax.tree.leaves(state) if a.dtype == jnp.bfloat16]
    for a, b, c in zip(*map(moments, (first, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert 0.1 < np.mean(a != c) < 0.9
    assert len(moments(first)) == 2


def test_noise_is_even_and_has_no_pattern():
    """Neither between neighbours along a dimension, nor between seeds."""
    a, b = (np.asarray(noise((64, 4, 128), jnp.uint32(seed)), np.float64) / 2**32 for seed in (5, 6))
    counts = np.histogram(a, bins=32, range=(0, 1))[0] / a.size
    np.testing.assert_allclose(counts, 1 / 32, rtol=0.15)
    pairs = [(a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[..., 1:], a[..., :-1])]
    assert all(abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.02 for x, y in pairs)
    assert len(np.unique(a)) > 0.999 * a.size
