"""The freeze table, schedules, per-part rates and weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.training import freeze
from omnifusion_jax.training.optimizer import decays, make_optimizer, schedule

ARRAYS = {
    "image/adapter/up/kernel": jnp.ones((4, 3)),
    "special/user": jnp.ones(3),
    "decoder/layers/feed_forward/up/kernel": jnp.ones((2, 3, 4)),
}
TABLE = ((r"(image/adapter|special)/.*", 1.0), (r"decoder/.*", None))


def test_every_parameter_is_trained_or_frozen():
    trained, frozen = freeze.split(TABLE, ARRAYS)
    assert set(trained) == {"image/adapter/up/kernel", "special/user"} and set(frozen) == {
        "decoder/layers/feed_forward/up/kernel"
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE[:1], "decoder/layers/feed_forward/up/kernel: 0 rows"),
        ((*TABLE, (r".*/up/kernel", 1.0)), "image/adapter/up/kernel: 2 rows"),
        ((*TABLE, (r"image/encoders/.*", None)), "no parameter matches 'image/encoders/.\\*'"),
        (((r".*", None),), "freezes everything"),
    ],
)
def test_a_table_that_does_not_cover_is_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        freeze.split(table, ARRAYS)


def test_cosine_with_warmup():
    rate = schedule(OptimizerConfig(learning_rate=1e-3, warmup=0.1), 100)
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 5e-4, 1e-3, 5e-4, 0], atol=1e-9
    )


def test_the_published_horizon_on_eight_devices():
    """A run ends at an eighth of the cosine, at 0.967 of the rate, after a warm-up of 8 % of its steps."""
    rate = schedule(OptimizerConfig(learning_rate=1.0, warmup=0.01, horizon=8.0), 1000)
    np.testing.assert_allclose(
        [rate(0), rate(40), rate(79), rate(80), rate(1000)], [0, 0.5, 0.9875, 1.0, 0.96707], atol=1e-5
    )
    assert rate(8000) == pytest.approx(0, abs=1e-9)


def test_a_horizon_before_the_end_is_refused():
    with pytest.raises(ConfigError, match=r"horizon is 0\.5"):
        OptimizerConfig(horizon=0.5).validate()


def test_a_part_learns_at_its_own_factor():
    table = ((r"image/adapter/.*", 1.0), (r"special/.*", 0.5))
    trained = {path: ARRAYS[path] for path in ("image/adapter/up/kernel", "special/user")}
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0, schedule="constant", learning_rate=0.1), 10, table)
    updates, _ = optimizer.update(
        {path: jnp.ones_like(a) for path, a in trained.items()}, optimizer.init(trained), trained
    )
    np.testing.assert_allclose(updates["image/adapter/up/kernel"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(updates["special/user"], -0.05, rtol=1e-4)


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 0.5), (None, 2.0), (100.0, 2.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, expected):
    """Seen in AdamW's first moment, a tenth of the first gradient: four entries of 2 have norm 4."""
    trained = {"image/adapter/linear/kernel": jnp.zeros((2, 2))}
    optimizer = make_optimizer(OptimizerConfig(clip=clip), 10, ((".*", 1.0),))
    _, state = optimizer.update(
        {"image/adapter/linear/kernel": jnp.full((2, 2), 2.0)}, optimizer.init(trained), trained
    )
    moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2))
    np.testing.assert_allclose(moment, 0.1 * expected, rtol=1e-5)


DECAYED = {"kernel", "embed", "head", "lora_a", "lora_b"}
KEPT = {
    "class_token",
    "registers",
    "position",
    "scale",
    "scale1",
    "scale2",
    "kernel_scale",
    "kernel_zero",
    "kernel_order",
    "bias",
    "weight",
    "queries",
    "user",
    "bot",
    "soi",
    "eoi",
    "newline",
}


def test_every_parameter_of_every_part_is_decayed_or_kept():
    names = {}
    for path in (path for arrays in tiny.systems().values() for path in arrays):
        names.setdefault(path.split("/")[-1], set()).add(decays(path))
    assert names == {name: {True} for name in DECAYED} | {name: {False} for name in KEPT}


DECAY_SHAPES = {
    "image/encoders/0/class_token": (4,),
    "image/adapter/linear/kernel": (4, 6),
    "image/adapter/linear/bias": (6,),
    "image/adapter/norm1/scale": (4,),
    "image/adapter/mixes/0/layers/weight": (3,),
    "special/user": (6,),
    "decoder/embed": (9, 6),
    "decoder/layers/attention/query/kernel": (2, 6, 2, 1, 3),
    "decoder/layers/norm1/scale": (2, 6),
}


@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_adamw_is_that_of_pytorch_with_two_groups_of_parameters(beta2):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    draw = lambda: {path: rng.normal(size=shape).astype(np.float32) for path, shape in DECAY_SHAPES.items()}
    start, gradients = draw(), [draw() for _ in range(3)]
    theirs = {path: torch.nn.Parameter(torch.tensor(a)) for path, a in start.items()}
    groups = [[], []]
    for path, p in theirs.items():
        groups[
            path in ("image/adapter/linear/kernel", "decoder/embed", "decoder/layers/attention/query/kernel")
        ].append(p)
    other = torch.optim.AdamW(
        [{"params": ps, "weight_decay": 0.3 * i} for i, ps in enumerate(groups)],
        lr=0.05,
        betas=(0.9, beta2),
        eps=1e-8,
    )
    config = OptimizerConfig(
        learning_rate=0.05, weight_decay=0.3, beta2=beta2, clip=None, warmup=0.0, schedule="constant"
    )
    optimizer = make_optimizer(config, 10, ((".*", 1.0),))
    ours, state, update = start, optimizer.init(start), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(gradient, state, ours)
        ours = {path: a + updates[path] for path, a in ours.items()}
        for path, p in theirs.items():
            p.grad = torch.tensor(gradient[path])
        other.step()
    for path, p in theirs.items():
        np.testing.assert_allclose(ours[path], p.detach().numpy(), rtol=0, atol=2e-6, err_msg=path)
