"""One training step.

Gradients are taken of the trained parameters only, summed over micro-batches, divided once by the number of
targets, and applied unless the loss or a gradient is not finite.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omnifusion_jax import sharding
from omnifusion_jax.batch import Batch
from omnifusion_jax.models import lora
from omnifusion_jax.models.axes import axes, spread
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import using
from omnifusion_jax.training.loss import by_rows
from omnifusion_jax.training.meters import OWN
from omnifusion_jax.training.moments import parameter_of

# Parameters that meet activations in `nn.linear.product` alone
KERNELS = r".*/(kernel|lora_[ab])|decoder/head"


class TrainState(NamedTuple):
    """Everything that changes from step to step, of the trained parameters only.

    `params` are float32; moments are as OptimizerConfig.moments says.
    """

    step: jax.Array  # int32
    bad_steps: jax.Array  # int32: how many were skipped for a NaN or infinite loss or gradient
    params: dict  # path -> array
    optimizer: object


def state_shardings(mesh: Mesh, state: TrainState) -> TrainState:
    """The sharding of every array of a state.

    Moments are sharded like their parameters, and so are scales of the blocks of their rows, where they can
    be cut; scalars and factored moments are replicated.
    """

    def of(path, leaf):
        name = parameter_of(path)
        if name not in state.params or not leaf.shape or leaf.shape[:-1] != state.params[name].shape[:-1]:
            return sharding.replicated(mesh)
        return sharding.sharding(mesh, axes(name), leaf.shape)

    return jax.tree_util.tree_map_with_path(of, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of the arrays of a Batch: rows and pools are spread over all copies and FSDP shards."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def init_state(optimizer: optax.GradientTransformation, params: dict) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), params, optimizer.init(params))


def portions(batch: Batch, n: int, together: int = 1) -> Batch:
    """Splits a batch into `n` portions, along a new leading axis of its arrays.

    Portion i takes every n-th pool from the i-th on, with its rows, so that it has rows of every device. If a
    batch has no media, `together` rows that follow one another are what a pool would hold.
    """
    views = [view for stream in batch.media.values() for view in stream]
    pools = len(views[0]) if views else len(batch.tokens) // together

    def cut(a):  # [pools * m, ...] to [n, pools / n * m, ...]
        a = a.reshape(pools // n, n, len(a) // pools, *a.shape[1:]).swapaxes(0, 1)
        return a.reshape(n, a.shape[1] * a.shape[2], *a.shape[3:])

    return jax.tree.map(cut, batch)


def updated(optimizer, state: TrainState, grads: dict, good: jax.Array) -> tuple:
    """(parameters, moments) after an update by the gradients; those of the state unless bool[] `good`."""
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    new = (optax.apply_updates(state.params, updates), moments)
    return jax.tree.map(lambda new, old: jnp.where(good, new, old), new, (state.params, state.optimizer))


def make_step(
    skeleton,
    objective,
    optimizer,
    *,
    seed,
    grad_accum,
    dtype,
    remat,
    loss_mean_rows=0,
    grad_dtype=jnp.float32,
    spread_sequence=False,
    attention="dense",
    operations=lambda batch: {},
):
    """Makes the function (state, frozen, batch) -> (state, metrics), to be jitted with the state donated.

    Its metrics are scalars: loss (what is minimised: the mean over target tokens, or over the means of
    `loss_mean_rows` rows each), targets (tokens), tokens (padding excluded), images, grad_norm, bad (steps
    skipped so far), those of `operations`, and the objective's own, whose names begin with OWN; and broken,
    bool[trained parameters] in the order of their paths: whose gradient is not finite.

    Args:
      skeleton: the abstract module whose parameters are the trained and the frozen arrays together.
      objective: an objectives.base.Objective, which gives the loss.
      dtype: of the computation.
      attention: a kernel, or a nn.choice.Choice of several.
      grad_dtype: of the gradients of kernels while devices sum them; see `nn.linear.product`.
      spread_sequence: between layers, the sequence is spread over the axis `tensor` of the mesh.
      operations: from a Batch to metrics of the work that it is, as meters.operations makes it.
    """
    also = {"seq": "tensor"} if spread_sequence else {}

    def loss(params, frozen, batch, key):
        # What multiplies is cast where it does. Rows of the embedding are cast where they are read, whatever
        # grad_dtype is: in bfloat16 the gradients of a frequent token would stop adding up.
        kept = {path: a.astype(grad_dtype) for path, a in params.items() if re.fullmatch(KERNELS, path)}
        kept |= {path: a for path, a in params.items() if path == "decoder/embed"}
        model = nnx.with_parameters(skeleton, {**spread({**cast(params, dtype), **kept}), **frozen})
        lora.set_dropping(model, key)
        with sharding.also(**also):
            value, count, *own = objective.loss(model, batch, key, remat)
        return value, (count, own[0] if own else {})

    def step(state, frozen, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        targets = batch.weights.sum()
        if loss_mean_rows:
            batch = batch._replace(weights=by_rows(batch.weights, loss_mean_rows))
        gradient = jax.value_and_grad(loss, has_aux=True)

        def accumulate(total, item):
            # The barrier ties the weights to the micro-batch. Otherwise XLA moves their all-gathers out of
            # the loop, and every chip holds the whole model.
            params, weights, (micro, key) = jax.lax.optimization_barrier((state.params, frozen, item))
            with using(attention):  # the backward pass too: parts of a forward pass may run again in it
                (value, (count, own)), grads = gradient(params, weights, micro, key)
            return jax.tree.map(jnp.add, total, (value, count, spread(grads))), own

        zero = (jnp.zeros(()), jnp.zeros(()), spread(jax.tree.map(jnp.zeros_like, state.params)))
        over_rows = lambda a: sharding.constrain(a, None, "batch", *[None] * (a.ndim - 2))
        micros = jax.tree.map(over_rows, portions(batch, grad_accum, objective.rows))
        keys = jax.random.split(key, grad_accum)
        (value, count, grads), own = jax.lax.scan(accumulate, zero, (micros, keys))
        count = jnp.maximum(count, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        norm = optax.global_norm(grads)
        good = jnp.isfinite(value) & jnp.isfinite(norm)
        params, moments = updated(optimizer, state, grads, good)
        broken = [~jnp.isfinite(jnp.sum(jnp.square(grads[path]))) for path in sorted(grads)]
        metrics = {
            "loss": value / count,
            "targets": targets,
            "tokens": (batch.kind > 0).sum(),
            "images": batch.items.sum(),
            "grad_norm": norm,
            "bad": state.bad_steps + ~good,
            "broken": jnp.stack(broken),
            **operations(batch),
            **{OWN + name: sums.sum() / count for name, sums in own.items()},
        }
        return TrainState(state.step + 1, metrics["bad"], params, moments), metrics

    return step
