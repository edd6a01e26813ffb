"""Measures the seconds that a training step takes, on a batch of random data.

python benchmarks/step.py VARIANT [config file, default configs/tiny.py]
"""

import importlib.util
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.batch import FEATURE, TEXT, Batch
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.freeze import split
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.step import init_state, make_step

STEPS = 8


def load(path, variant):
    """The TrainConfig of a config file's variant."""
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant)


def random_batch(config):
    """Rows of one picture and then text, of which the second half are targets."""
    rng = np.random.default_rng(0)
    rows, length, features = config.batch_size, config.data.max_length, config.model.image.rows
    kind = np.full((rows, length), TEXT, np.int32)
    kind[:, 10 : 10 + features] = FEATURE
    index = np.zeros((rows, length), np.int32)
    index[:, 10 : 10 + features] = np.arange(features)
    weights = np.tile(np.arange(length) > (10 + features + length) // 2, (rows, 1)).astype(np.float32)
    pools = config.grad_accum
    images = tuple(
        rng.integers(0, 256, (pools, rows // pools, view.size, view.size, 3), np.uint8)
        for view in config.model.image.views
    )
    first = np.arange(rows)[:, None] % (rows // pools) * features  # where a row's picture begins in its pool
    index += np.where(kind == FEATURE, first, 0).astype(np.int32)
    tokens = rng.integers(3, config.model.decoder.vocab, (rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    items = np.ones(rows, np.int32)
    return Batch(tokens, kind, index, weights, np.ones_like(kind), positions, items, {"image": images})


def main(variant, path="configs/tiny.py"):
    config = load(path, variant).validate()
    objective = OBJECTIVES[config.objective]
    module = objective.module(config.model, rngs=nnx.Rngs(0))
    trained, frozen = split(config.train_parts, nnx.parameters(module))
    optimizer = make_optimizer(config.optimizer, config.steps, config.train_parts)
    settings = {
        "grad_accum": config.grad_accum,
        "remat": config.remat,
        "loss_mean_rows": config.loss_mean_rows,
    }
    step = make_step(module, objective, optimizer, seed=0, dtype=jnp.dtype(config.compute_dtype), **settings)
    step, state, batch = jax.jit(step, donate_argnums=0), init_state(optimizer, trained), random_batch(config)
    seconds = []
    for _ in range(STEPS + 1):
        before = time.perf_counter()
        state, _ = step(state, frozen, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - before)
    low, median, high = np.quantile(seconds[1:], (0, 0.5, 1))
    later = f"{median:.3f} s (from {low:.3f} to {high:.3f}, {STEPS} steps)"
    print(f"{path}:{variant}: first step {seconds[0]:.1f} s, then {later}")


if __name__ == "__main__":
    main(*sys.argv[1:])
