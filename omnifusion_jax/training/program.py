"""The program of a run: its step, and the shape, type and place of every array that the step takes.

The loop runs it. The planner compiles it for devices that are not there, and so compiles what trains.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from omnifusion_jax import sharding
from omnifusion_jax.config import TrainConfig, check, of_encoders, part_of
from omnifusion_jax.models import lora
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import Choice
from omnifusion_jax.nn.stack import HOST, offloads
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import freeze, meters
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.step import TrainState, init_state, make_step, state_shardings


class Program(NamedTuple):
    """Arrays are `jax.ShapeDtypeStruct`s with their shardings."""

    step: Callable  # (state, frozen, batch) -> (state, metrics), jitted; the state is donated
    optimizer: optax.GradientTransformation
    skeleton: Any  # the objective's module with shapes for parameters
    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]


def build(config: TrainConfig, *, rngs: nnx.Rngs):
    """The objective's module, with factors and scales beside its kernels where `config.lora` asks for them.

    Raises: ConfigError when `config.lora` does not fit the module or the freeze table.
    """
    module = OBJECTIVES[config.objective].module(config.model, rngs=rngs)
    paths = list(nnx.parameters(module))
    frozen = [path for path in paths if freeze.factor(config.train_parts, path) is None]
    both = sorted(set(lora.targets(config.lora, paths)) - set(frozen))
    check(
        not both,
        f"train_parts trains {', '.join(both[:3])} itself, and lora.targets gives it factors. "
        "Freeze it (None), or leave it out of lora.targets",
    )
    lora.add_factors(module, config.lora, rngs=rngs)
    if config.lora.base != "compute_dtype":
        lora.add_scales(module, frozen)
    return module


def make_program(
    config: TrainConfig, mesh: Mesh, tell: Callable[[str], None] | None = None, features: Collection[str] = ()
) -> Program:
    """The Program of a run on a mesh, whose devices need not be there.

    Args:
      tell: called with lines that say which kernels of attention were taken, and why.
      features: streams whose media come as features of their encoders, which are then no part of the program.
    Raises: ConfigError when the batch does not fit the mesh, when its devices cannot do what is asked of
      them, when a table (`train_parts`, AXES, DECAY) does not cover every parameter exactly once, or when the
      finished run could not be written.
    """
    objective, dtype = OBJECTIVES[config.objective].of(config), jnp.dtype(config.compute_dtype)
    examples = config.batch_size // config.grad_accum  # their rows stay together on one device
    shards = sharding.ways(mesh, "batch")
    check(
        examples % shards == 0,
        f"batch_size / grad_accum is {examples} examples at a time, which {shards} devices "
        "(mesh.data * mesh.fsdp) cannot share evenly. Change one of them",
    )
    device = mesh.devices.flat[0]
    check(
        config.remat != "offload" or offloads(device),
        f"remat=offload: devices of {device.platform} have no {HOST} memory. Choose remat=full",
    )
    attention = Choice.of(config.attention, device.platform, packed=config.data.packing, tell=tell)
    skeleton = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    trained, frozen = freeze.split(config.train_parts, nnx.parameters(skeleton))
    broken = sorted(set(map(part_of, trained)) & set(map(part_of, frozen)))
    check(
        not broken or config.checkpoint.final == "complete",
        f"train_parts trains {', '.join(broken)} in part, and checkpoint.final=trained writes whole parts. "
        "Set checkpoint.final=complete",
    )
    for stream in features:
        getattr(skeleton, stream).take_features()
    frozen = {path: a for path, a in frozen.items() if not of_encoders(path, features)}
    trained = jax.eval_shape(partial(cast, dtype=jnp.float32), trained)
    frozen = jax.eval_shape(lambda arrays: cast(lora.quantised(arrays, config.lora.base), dtype), frozen)
    optimizer = make_optimizer(config.optimizer, config.steps, config.train_parts)
    state = jax.eval_shape(lambda p: init_state(optimizer, p), trained)
    shardings = state_shardings(mesh, state)
    step = make_step(
        skeleton,
        objective,
        optimizer,
        seed=config.seed,
        grad_accum=config.grad_accum,
        dtype=dtype,
        remat=config.remat,
        loss_mean_rows=config.loss_mean_rows,
        attention=attention,
        grad_dtype=jnp.dtype(config.grad_dtype),
        spread_sequence=config.spread_sequence,
        operations=meters.operations(config, trained, frozen, features),
    )
    return Program(
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh))),
        optimizer,
        skeleton,
        sharding.placed(state, shardings),
        sharding.placed(frozen, placements(mesh, frozen)),
    )
