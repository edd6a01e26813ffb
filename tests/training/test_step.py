"""One step on objectives of a few numbers, whose gradients are known: keys, precision, broken steps,
averaging, what lies where."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from numpy.testing import assert_allclose, assert_array_equal

from omnifusion_jax import sharding
from omnifusion_jax.batch import FEATURE, TEXT, Batch
from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.nn import nnx
from omnifusion_jax.training.loss import by_rows
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.step import batch_sharding, init_state, make_step, state_shardings


class Words(nnx.Module):
    def __init__(self, embed):
        self.embed = nnx.Param(embed)


class Toy(nnx.Module):
    """A vector (of a path that the table of weight decay knows), and an embedding table where decoders have
    theirs."""

    def __init__(self, head, embed):
        self.head, self.decoder = nnx.Param(head), Words(embed)


def batch_of(rows, length=4, **arrays):
    plane = np.ones((rows, length), np.int32)
    given = {
        "tokens": plane,
        "kind": plane * TEXT,
        "index": plane,
        "weights": np.ones((rows, length), np.float32),
        "segments": plane,
    }
    given |= {"items": np.zeros(rows, np.int32), "media": {}}
    return Batch(**{**given, **arrays}, positions=plane)


def begin(loss, params, optimizer=tiny.RECORDER, seed=0, grad_accum=1, dtype="float32", rows=1, **settings):
    """(state, step) of a toy with the trained `params`; all it has is trained."""
    params = {
        path: jnp.asarray(a, jnp.float32)
        for path, a in ({"head": np.zeros(2), "decoder/embed": np.zeros((3, 2))} | params).items()
    }
    skeleton = nnx.eval_shape(lambda: Toy(params["head"], params["decoder/embed"]))
    objective = types.SimpleNamespace(
        rows=rows, loss=lambda module, batch, key, remat: loss(module, batch, key)
    )
    step = make_step(
        skeleton,
        objective,
        optimizer,
        seed=seed,
        grad_accum=grad_accum,
        dtype=jnp.dtype(dtype),
        remat="none",
        **settings,
    )
    return init_state(optimizer, params), jax.jit(lambda state, batch: step(state, {}, batch))


def noise(module, batch, key):
    """The gradient is what the key draws."""
    return module.head[...] @ jax.random.normal(key, module.head[...].shape), batch.weights.sum()


def drawn(state):
    return np.asarray(state.optimizer["head"])


def test_every_step_draws_anew_and_the_same_again():
    state, step = begin(noise, {"head": np.zeros(10_000)}, seed=3)
    first, _ = step(state, batch_of(1, 1))
    second, _ = step(first, batch_of(1, 1))
    assert abs(np.corrcoef(drawn(first), drawn(second))[0, 1]) < 0.05
    assert_array_equal(drawn(step(state, batch_of(1, 1))[0]), drawn(first))
    _, other = begin(noise, {"head": np.zeros(10_000)}, seed=4)
    assert abs(np.corrcoef(drawn(first), drawn(other(state, batch_of(1, 1))[0]))[0, 1]) < 0.05


@pytest.mark.parametrize("accumulate", [2, 4])
def test_every_micro_batch_draws_its_own(accumulate):
    """The sum of n independent draws has n times the variance of one, n equal draws n squared times."""
    state, step = begin(noise, {"head": np.zeros(20_000)}, grad_accum=accumulate)
    state, _ = step(state, batch_of(accumulate, 1))
    assert_allclose((drawn(state) * accumulate).var(), accumulate, rtol=0.1)  # one target each


def test_metrics():
    """Three rows, the first of two pictures; loss 3 v0 + 4 v1 a target, five targets."""
    weights = np.array([[0, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]], np.float32)
    kind = np.array([[FEATURE, 1, 1, 0], [1, 1, 1, 1], [FEATURE, FEATURE, 0, 0]], np.int32)

    def loss(module, batch, key):
        return batch.weights.sum() * (module.head[...] @ jnp.array([3.0, 4.0])), batch.weights.sum()

    state, step = begin(loss, {"head": [1.0, 2.0]}, grad_accum=3)
    state, metrics = step(state, batch_of(3, weights=weights, kind=kind, items=np.array([2, 0, 1], np.int32)))
    assert not metrics.pop("broken").any()
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {"loss": 11.0, "targets": 5, "tokens": 9, "images": 3, "grad_norm": 5.0, "bad": 0}
    )
    assert_allclose(drawn(state), [3.0, 4.0], rtol=1e-6)
    state, metrics = step(state, batch_of(3, weights=0 * weights))
    assert (
        float(metrics["loss"])
        == float(metrics["grad_norm"])
        == float(metrics["targets"])
        == float(metrics["bad"])
        == 0
    )
    assert int(state.step) == 2


def test_gradients_of_a_frequent_token_add_up_in_float32():
    """A thousand ones: in bfloat16 the sum would stop at 256. What is no embedding table is computed with in
    bfloat16."""
    types = {}

    def loss(module, batch, key):
        types.update(head=module.head[...].dtype, embed=module.decoder.embed[...].dtype)
        return module.decoder.embed[...][batch.tokens].astype(jnp.bfloat16).astype(
            jnp.float32
        ).sum(), jnp.ones(())

    state, step = begin(loss, {}, dtype="bfloat16")
    state, _ = step(state, batch_of(10, 100))
    assert types == {"head": jnp.bfloat16, "embed": jnp.float32}
    assert_array_equal(state.optimizer["decoder/embed"], [[0, 0], [1000, 1000], [0, 0]])


def test_gradients_of_micro_batches_add_up_in_float32():
    state, step = begin(
        lambda module, batch, key: (module.head[...].astype(jnp.float32).sum(), jnp.ones(())),
        {},
        grad_accum=512,
        dtype="bfloat16",
    )
    state, _ = step(state, batch_of(512, 1))
    assert state.optimizer["head"].dtype == jnp.float32
    assert_array_equal(drawn(state) * 512, [512, 512])


BREAKS = {  # what makes the loss below NaN, its gradient, both
    "loss": {"index": np.zeros((1, 1), np.int32)},
    "gradient": {"tokens": np.zeros((1, 1), np.int32)},
    "both": {"weights": np.full((1, 1), np.nan, np.float32)},
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_step_leaves_no_trace_but_its_count(broken):
    """0 times the logarithm of 0 is no number, and the square root has no gradient at 0."""

    def loss(module, batch, key):
        x = module.head[...]
        value = batch.weights[0, 0] * (x @ x) + jnp.sqrt(batch.tokens[0, 0] * x[0])
        return value + 0 * jnp.log(batch.index[0, 0].astype(jnp.float32)), batch.weights.sum()

    good, bad = (
        [batch_of(1, 1), batch_of(1, 1, weights=np.full((1, 1), 2, np.float32))],
        batch_of(1, 1, **BREAKS[broken]),
    )
    start, step = begin(
        loss,
        {"head": [2.0, 3.0]},
        make_optimizer(OptimizerConfig(warmup=0.0, weight_decay=0.1), 10, ((".*", 1.0),)),
    )
    without, _ = step(step(start, good[0])[0], good[1])
    first, _ = step(start, good[0])
    second, metrics = step(first, bad)
    finite = bool(np.isfinite(metrics["loss"])), bool(np.isfinite(metrics["grad_norm"]))
    assert finite == (broken == "gradient", broken == "loss")
    assert (int(second.step), int(second.bad_steps), int(metrics["bad"])) == (2, 1, 1)
    third, metrics = step(second, good[1])
    assert (int(third.step), int(third.bad_steps), int(metrics["bad"])) == (3, 1, 1)
    for path, a in without.params.items():
        assert_array_equal(third.params[path], a)
    for ours, theirs in zip(
        jax.tree.leaves(third.optimizer), jax.tree.leaves(without.optimizer), strict=True
    ):
        assert_array_equal(ours, theirs)
    assert np.abs(third.params["head"] - first.params["head"]).max() > 1e-4


def test_weights_of_groups_of_rows():
    weights = np.array(
        [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32
    )
    by_two = [[0, 0.25, 0.25, 0], [0, 0.25, 0.25, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert_array_equal(by_rows(weights, 2), by_two)
    assert_array_equal(by_rows(weights, 1), [[0, 0.5, 0.5, 0], [0, 0.5, 0.5, 0], *by_two[2:]])
    assert np.isnan(by_rows(weights * np.nan, 2)).all()


@pytest.mark.parametrize(("rows", "accumulate"), [(0, 4), (1, 1), (1, 8), (2, 1), (2, 4), (8, 2)])
def test_the_mean_of_means_is_that_of_groups_of_rows_whatever_the_micro_batches(rows, accumulate):
    rng = np.random.default_rng(0)
    costs, tokens = rng.normal(size=(3, 2)), rng.integers(0, 3, (8, 5), np.int32)
    weights = (rng.random((8, 5)) < 0.4).astype(np.float32)
    weights[2:4] = 0  # a group without targets

    def loss(module, batch, key):
        cost = module.decoder.embed[...].sum(axis=1)[batch.tokens]
        return (cost * batch.weights).sum(), batch.weights.sum()

    state, step = begin(loss, {"decoder/embed": costs}, grad_accum=accumulate, loss_mean_rows=rows)
    state, metrics = step(state, batch_of(8, tokens=tokens, weights=weights))
    seen = [tokens[i : i + (rows or 8)][weights[i : i + (rows or 8)] > 0] for i in range(0, 8, rows or 8)]
    seen = [targets for targets in seen if len(targets)]
    assert_allclose(
        metrics["loss"], np.mean([costs.sum(axis=1)[targets].mean() for targets in seen]), rtol=1e-5
    )
    assert metrics["targets"] == weights.sum()
    gradient = np.mean([np.bincount(targets, minlength=3) / len(targets) for targets in seen], axis=0)
    assert_allclose(state.optimizer["decoder/embed"], np.stack([gradient] * 2, axis=1), rtol=1e-5, atol=1e-7)


def test_each_device_has_rows_of_its_own():
    placed = batch_sharding(sharding.make_mesh(data=2, fsdp=4))
    assert placed.shard_shape((16, 5)) == (2, 5)
    assert sorted(rows.start for rows, _ in placed.devices_indices_map((16, 5)).values()) == list(
        range(0, 16, 2)
    )


def test_a_micro_batch_takes_rows_from_everywhere():
    """Rows 0 and 2, then 1 and 3: so each device, which holds neighbouring rows, has its share of both."""
    state, step = begin(
        lambda module, batch, key: (module.head[...].sum() * batch.tokens.max(), jnp.ones(())),
        {},
        grad_accum=2,
    )
    state, _ = step(state, batch_of(4, 1, tokens=np.arange(4, dtype=np.int32)[:, None]))
    assert_array_equal(drawn(state) * 2, [2 + 3, 2 + 3])


@pytest.mark.parametrize("pictures", [False, True], ids=["text", "a pool for each pair"])
@pytest.mark.parametrize("grad_accum", [2, 4])
def test_the_rows_of_a_pair_stay_together(grad_accum, pictures):
    """An objective on pairs: micro-batches see whole ones, so the sum over pairs is that of one portion."""

    def difference(module, batch, key):
        chosen, rejected = batch.tokens.reshape(-1, 2, batch.tokens.shape[1]).sum(axis=-1).T
        return module.head[...].sum() * jnp.square(chosen - rejected).sum(), jnp.float32(len(chosen))

    media = {"image": (np.zeros((8, 1, 2, 2, 3), np.uint8),)} if pictures else {}
    tokens = np.random.default_rng(0).integers(0, 9, (16, 1)).astype(np.int32)
    batch = batch_of(16, 1, tokens=tokens, media=media)
    seen = []
    for n in (1, grad_accum):
        state, step = begin(difference, {}, grad_accum=n, rows=2)
        state, _ = step(state, batch)
        seen.append(drawn(state))
    expected = np.square(tokens[::2] - tokens[1::2]).mean()
    assert_allclose(seen, [[expected] * 2] * 2, rtol=1e-6)


def test_moments_lie_as_their_parameters_do():
    params = {
        "decoder/layers/feed_forward/up/kernel": jax.ShapeDtypeStruct((2, 8, 16), np.float32),
        "decoder/norm/scale": jax.ShapeDtypeStruct((8,), np.float32),
    }
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    expected = {
        "decoder/layers/feed_forward/up/kernel": PartitionSpec(None, "fsdp", "tensor"),
        "decoder/norm/scale": PartitionSpec(None),
    }
    for name, moments in (("adamw", 2), ("adafactor", 0)):
        state = jax.eval_shape(
            lambda p, name=name: init_state(
                make_optimizer(OptimizerConfig(name=name), 10, ((".*", 1.0),)), p
            ),
            params,
        )
        placed = state_shardings(mesh, state)
        assert {path: a.spec for path, a in placed.params.items()} == expected
        assert placed.step.spec == placed.bad_steps.spec == PartitionSpec()
        specs = [a.spec for a in jax.tree.leaves(placed.optimizer)]
        assert specs.count(expected["decoder/layers/feed_forward/up/kernel"]) == moments
        assert all(spec in (*expected.values(), PartitionSpec()) for spec in specs)
