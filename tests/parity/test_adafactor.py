"""The Adafactor of `:original` against the one of the published code, transformers' own, on the tensors that
PyTorch's modules hold."""

import jax
import numpy as np
import pytest

from omnifusion_jax.config import OptimizerConfig
from omnifusion_jax.training.optimizer import make_optimizer

# Ours, and from the array of one layer to PyTorch's tensor: nn.Linear's weight is [out, in], biases and norms
# are vectors
PAIRS = {
    "decoder/layers/attention/query": ((2, 6, 2, 2, 4), lambda a: a.reshape(6, 16).T),  # two layers
    "decoder/layers/attention/out": ((2, 2, 2, 4, 6), lambda a: a.reshape(16, 6).T),
    "decoder/layers/up": ((2, 6, 10), lambda a: a.T),
    "decoder/layers/norm1/scale": ((2, 6), lambda a: a),
    "decoder/norm/scale": ((6,), lambda a: a),
    "decoder/embed": ((9, 6), lambda a: a),
    "encoders/0/layers/attention/query_bias": ((2, 3, 4), lambda a: a.reshape(12)),
    "encoders/0/layers/attention/query_norm/scale": ((2, 3, 4), lambda a: a.reshape(12)),
    "adapter/qkv": ((6, 3, 2, 3), lambda a: a.reshape(6, 18).T),  # in_proj_weight: one matrix for all three
    "adapter/qkv_bias": ((3, 2, 3), lambda a: a.reshape(18)),
    "adapter/out": ((2, 3, 6), lambda a: a.reshape(6, 6).T),
    "adapter/linear": ((6, 8), lambda a: a.T),
    "adapter/mixes/0/layers/kernel": ((3, 6, 4), lambda a: a.T),
    "adapter/mixes/0/layers/weight": ((3,), lambda a: a),
    "special/user": ((6,), lambda a: a),
}


def tensors(path, a):
    """The array of `path` as PyTorch would hold it, one a layer."""
    _, theirs = PAIRS[path]
    return [np.array(theirs(layer)) for layer in a] if "/layers/" in path else [np.array(theirs(a))]


def test_five_steps_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.optimization import Adafactor

    rng = np.random.default_rng(0)
    draw = lambda scale: {path: rng.normal(size=shape).astype(np.float32) * scale for path, (shape, _) in PAIRS.items()}
    start = draw(1.0)
    theirs = {path: [torch.nn.Parameter(torch.tensor(t)) for t in tensors(path, a)] for path, a in start.items()}
    other = Adafactor([p for row in theirs.values() for p in row], lr=1e-2, relative_step=False, scale_parameter=True, warmup_init=False)
    config = OptimizerConfig(name="adafactor", learning_rate=1e-2, clip=None, warmup=0.0, schedule="constant")
    optimizer = make_optimizer(config, 10, ((".*", 1.0),))
    ours = start
    state, update = jax.jit(optimizer.init)(ours), jax.jit(optimizer.update)
    for _ in range(5):
        gradient = draw(0.1)
        updates, state = update(gradient, state, ours)
        ours = {path: a + updates[path] for path, a in ours.items()}
        for path, row in theirs.items():
            for p, g in zip(row, tensors(path, gradient[path]), strict=True):
                p.grad = torch.tensor(g)
        other.step()
    for path, row in theirs.items():
        for mine, p, before in zip(tensors(path, np.asarray(ours[path])), row, tensors(path, start[path]), strict=True):
            np.testing.assert_allclose(mine, p.detach().numpy(), rtol=0, atol=2e-6, err_msg=path)
            assert np.abs(mine - before).max() > 1e-3
