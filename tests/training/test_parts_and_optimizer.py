"""The freeze table, schedules and per-part rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.training import parts
from omnifusion_jax.training.optimizer import make_optimizer, schedule

ARRAYS = {"adapter/up": jnp.ones((4, 3)), "special/user": jnp.ones(3), "decoder/layers/up": jnp.ones((2, 3, 4))}
TABLE = ((r"(adapter|special)/.*", 1.0), (r"decoder/.*", None))


def test_every_parameter_is_trained_or_frozen():
    trained, frozen = parts.split(TABLE, ARRAYS)
    assert set(trained) == {"adapter/up", "special/user"} and set(frozen) == {"decoder/layers/up"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (TABLE[:1], "decoder/layers/up: 0 rows"),
        ((*TABLE, (r".*/up", 1.0)), "adapter/up: 2 rows"),
        ((*TABLE, (r"encoders/.*", None)), "no parameter matches 'encoders/.\\*'"),
        (((r".*", None),), "freezes everything"),
    ],
)
def test_a_table_that_does_not_cover_is_refused(table, message):
    with pytest.raises(ConfigError, match=message):
        parts.split(table, ARRAYS)


def test_cosine_with_warmup():
    rate = schedule(OptimizerConfig(learning_rate=1e-3, warmup=0.1), 100)
    np.testing.assert_allclose([rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 5e-4, 1e-3, 5e-4, 0], atol=1e-9)


def test_a_part_learns_at_its_own_factor():
    table = ((r"adapter/.*", 1.0), (r"special/.*", 0.5))
    trained = {path: ARRAYS[path] for path in ("adapter/up", "special/user")}
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0, schedule="constant", learning_rate=0.1), 10, table)
    updates, _ = optimizer.update({path: jnp.ones_like(a) for path, a in trained.items()}, optimizer.init(trained), trained)
    np.testing.assert_allclose(updates["adapter/up"], -0.1, rtol=1e-4)
    np.testing.assert_allclose(updates["special/user"], -0.05, rtol=1e-4)


@pytest.mark.parametrize(("clip", "expected"), [(1.0, 0.5), (None, 2.0), (100.0, 2.0)])
def test_gradients_are_clipped_by_their_global_norm(clip, expected):
    """Seen in AdamW's first moment, which takes a tenth of the first gradient: four entries of 2 have norm 4."""
    trained = {"adapter/linear": jnp.zeros((2, 2))}
    optimizer = make_optimizer(OptimizerConfig(clip=clip), 10, ((".*", 1.0),))
    _, state = optimizer.update({"adapter/linear": jnp.full((2, 2), 2.0)}, optimizer.init(trained), trained)
    moment = next(leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 2))
    np.testing.assert_allclose(moment, 0.1 * expected, rtol=1e-5)
