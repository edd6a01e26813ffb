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
    "decoder/layers/attention/query/kernel": ((2, 6, 2, 2, 4), lambda a: a.reshape(6, 16).T),  # two layers
    "decoder/layers/attention/out/kernel": ((2, 2, 2, 4, 6), lambda a: a.reshape(16, 6).T),
    "decoder/layers/feed_forward/up/kernel": ((2, 6, 10), lambda a: a.T),
    "decoder/layers/norm1/scale": ((2, 6), lambda a: a),
    "decoder/norm/scale": ((6,), lambda a: a),
    "decoder/embed": ((9, 6), lambda a: a),
    "image/encoders/0/layers/attention/query/bias": ((2, 3, 4), lambda a: a.reshape(12)),
    "image/encoders/0/layers/attention/query_norm/scale": ((2, 3, 4), lambda a: a.reshape(12)),
    "image/adapter/layer/attention/out/kernel": ((2, 3, 6), lambda a: a.reshape(6, 6).T),
    "image/adapter/linear/kernel": ((6, 8), lambda a: a.T),
    "image/adapter/mixes/0/layers/kernel": ((3, 6, 4), lambda a: a.T),
    "image/adapter/mixes/0/layers/weight": ((3,), lambda a: a),
    "special/user": ((6,), lambda a: a),
}
IN_PROJ = {  # of a transformer layer: one tensor for queries, keys and values
    "kernel": ((6, 2, 3), lambda a: a.reshape(6, 6).T),
    "bias": ((2, 3), lambda a: a.reshape(6)),
}
SHAPES = {path: shape for path, (shape, _) in PAIRS.items()} | {
    f"image/adapter/layer/attention/{name}/{kind}": shape
    for name in ("query", "key", "value")
    for kind, (shape, _) in IN_PROJ.items()
}


def tensors(arrays):
    """Lists of what PyTorch would hold, one tensor a layer, by name."""
    arrays = {path: np.asarray(a) for path, a in arrays.items()}
    layers = lambda path: arrays[path] if "/layers/" in path else arrays[path][None]
    found = {path: [np.array(theirs(a)) for a in layers(path)] for path, (_, theirs) in PAIRS.items()}
    for kind, (_, theirs) in IN_PROJ.items():
        thirds = [
            theirs(arrays[f"image/adapter/layer/attention/{name}/{kind}"])
            for name in ("query", "key", "value")
        ]
        found[f"in_proj {kind}"] = [np.concatenate(thirds)]
    return found


def test_five_steps_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.optimization import Adafactor

    rng = np.random.default_rng(0)
    draw = lambda scale: {
        path: rng.normal(size=shape).astype(np.float32) * scale for path, shape in SHAPES.items()
    }
    start = draw(1.0)
    theirs = {
        name: [torch.nn.Parameter(torch.tensor(t)) for t in row] for name, row in tensors(start).items()
    }
    other = Adafactor(
        [p for row in theirs.values() for p in row],
        lr=1e-2,
        relative_step=False,
        scale_parameter=True,
        warmup_init=False,
    )
    config = OptimizerConfig(name="adafactor", learning_rate=1e-2, clip=None, warmup=0.0, schedule="constant")
    optimizer = make_optimizer(config, 10, ((".*", 1.0),))
    ours = start
    state, update = jax.jit(optimizer.init)(ours), jax.jit(optimizer.update)
    for _ in range(5):
        gradient = draw(0.1)
        updates, state = update(gradient, state, ours)
        ours = {path: a + updates[path] for path, a in ours.items()}
        found = tensors(gradient)
        for name, row in theirs.items():
            for p, g in zip(row, found[name], strict=True):
                p.grad = torch.tensor(g)
        other.step()
    before, after = tensors(start), tensors(ours)
    for name, row in theirs.items():
        for mine, p, old in zip(after[name], row, before[name], strict=True):
            np.testing.assert_allclose(mine, p.detach().numpy(), rtol=0, atol=2e-6, err_msg=name)
            assert np.abs(mine - old).max() > 1e-3
