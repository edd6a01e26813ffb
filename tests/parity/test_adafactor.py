"""The Adafactor of `:original` against the one of the published code, transformers' own."""

import jax.numpy as jnp
import numpy as np
import pytest

from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.training.optimizer import make_optimizer, matrices

SHAPES = {
    "decoder/layers/attention/query": (2, 6, 2, 2, 4),
    "decoder/layers/attention/out": (2, 2, 2, 4, 6),
    "decoder/layers/up": (2, 6, 10),
    "decoder/norm/scale": (6,),
    "adapter/qkv": (6, 3, 2, 3),
    "adapter/qkv_bias": (3, 2, 3),
    "special/user": (6,),
}


def test_five_steps_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.optimization import Adafactor

    rng = np.random.default_rng(0)
    draw = lambda scale: {path: rng.normal(size=shape).astype(np.float32) * scale for path, shape in SHAPES.items()}
    start = draw(1.0)
    theirs = {path: [torch.nn.Parameter(torch.tensor(np.array(m))) for m in matrices(path, a)] for path, a in start.items()}
    other = Adafactor([p for row in theirs.values() for p in row], lr=1e-2, relative_step=False, scale_parameter=True, warmup_init=False)
    config = OptimizerConfig(name="adafactor", learning_rate=1e-2, clip=None, warmup=0.0, schedule="constant")
    optimizer = make_optimizer(config, 10, ((".*", 1.0),))
    ours = {path: jnp.asarray(a) for path, a in start.items()}
    state = optimizer.init(ours)
    for _ in range(5):
        gradient = draw(0.1)
        updates, state = optimizer.update({path: jnp.asarray(g) for path, g in gradient.items()}, state, ours)
        ours = {path: a + updates[path] for path, a in ours.items()}
        for path, row in theirs.items():
            for p, m in zip(row, matrices(path, gradient[path]), strict=True):
                p.grad = torch.tensor(np.array(m))
        other.step()
    for path, row in theirs.items():
        expected = np.stack([p.detach().numpy() for p in row])
        np.testing.assert_allclose(matrices(path, ours[path]), expected, atol=2e-6)
        assert np.abs(expected - matrices(path, start[path])).max() > 1e-3
