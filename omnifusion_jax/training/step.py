"""One training step: gradients of the trained part only, summed over micro-batches, divided once, applied unless the loss is broken."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from omnifusion_jax import sharding
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.training.loss import by_rows


class TrainState(NamedTuple):
    """All that changes from step to step. `params` and the optimizer's moments are float32 and only of what is trained."""

    step: jax.Array  # int32
    bad_steps: jax.Array  # int32: skipped for a NaN or infinite loss or gradient
    params: dict  # path -> array
    optimizer: object


def state_shardings(mesh, state):
    """The sharding of every array of a TrainState: moments lie as their parameters do, scalars and factored moments are replicated."""
    placed = placements(mesh, state.params)

    def of(path, leaf):
        name = next((key.key for key in reversed(path) if isinstance(key, jax.tree_util.DictKey)), None)
        return (
            placed[name]
            if name in placed and leaf.shape == state.params[name].shape
            else sharding.replicated(mesh)
        )

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(mesh):
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def init_state(optimizer, params):
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, optimizer.init(params))


def portions(batch, n):
    """A Batch as `n` of them, by a leading axis. The i-th takes every n-th pool with its rows, so that each keeps rows of
    every device."""
    pools = next((len(view) for views in batch.media.values() for view in views), len(batch.tokens))

    def cut(a):  # [pools * m, ...] to [n, pools / n * m, ...]
        a = a.reshape(pools // n, n, len(a) // pools, *a.shape[1:]).swapaxes(0, 1)
        return a.reshape(n, a.shape[1] * a.shape[2], *a.shape[3:])

    return jax.tree.map(cut, batch)


def make_step(skeleton, objective, optimizer, *, seed, grad_accum, dtype, remat, loss_mean_rows=0):
    """The function (state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    `skeleton` is the abstract module that trained and frozen arrays fill together; compute is in `dtype`. Metrics are
    scalars: loss (what is minimised: the mean over target tokens, or over means of `loss_mean_rows` rows each), targets
    (tokens), tokens (padding excluded), images, grad_norm, bad (steps skipped so far).
    """

    def loss(params, frozen, batch, key):
        # Rows of the embedding are cast where they are read: in bfloat16 the gradients of a frequent token would stop adding up.
        kept = {path: a for path, a in params.items() if path == "decoder/embed"}
        model = nnx.with_parameters(skeleton, {**cast(params, dtype), **kept, **frozen})
        return objective.loss(model, batch, key, remat)

    def step(state, frozen, batch):
        key, targets = jax.random.fold_in(jax.random.key(seed), state.step), batch.weights.sum()
        if loss_mean_rows:
            batch = batch._replace(weights=by_rows(batch.weights, loss_mean_rows))
        gradient = jax.value_and_grad(loss, has_aux=True)

        def accumulate(total, item):
            # the barrier makes weights vary with the micro-batch: else their all-gathers move out of the loop, and every chip holds the whole model
            params, weights, (micro, key) = jax.lax.optimization_barrier((state.params, frozen, item))
            (value, count), grads = gradient(params, weights, micro, key)
            return jax.tree.map(jnp.add, total, (value, count, grads)), None

        zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        micros = jax.tree.map(
            lambda a: sharding.constrain(a, None, "batch", *[None] * (a.ndim - 2)),
            portions(batch, grad_accum),
        )
        (value, count, grads), _ = jax.lax.scan(accumulate, zero, (micros, jax.random.split(key, grad_accum)))
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        norm = optax.global_norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        new = (optax.apply_updates(state.params, updates), moments)
        params, moments = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), new, (state.params, state.optimizer)
        )
        metrics = {
            "loss": value / count,
            "targets": targets,
            "tokens": (batch.kind > 0).sum(),
            "images": batch.items.sum(),
            "grad_norm": norm,
            "bad": state.bad_steps + ~good,
        }
        return TrainState(state.step + 1, metrics["bad"], params, moments), metrics

    return step
