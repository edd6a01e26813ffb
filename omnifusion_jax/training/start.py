"""What a run begins with: its parameters, given or drawn, and its first state."""

import jax
import jax.numpy as jnp

from omnifusion_jax.config import TrainConfig, of_encoders, part_of
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.models import lora
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.training import freeze
from omnifusion_jax.training.program import Program, build
from omnifusion_jax.training.step import TrainState, init_state


def fill(config: TrainConfig, mesh, given: dict, features=()):
    """Makes every parameter of a run, sharded over `mesh`.

    The parameters in `given`, {path: array}, are taken out of it and used as they are; the others are drawn
    from the seed. Encoders of the streams in `features` are left out.

    Returns: (the module that `build` makes, with shapes for parameters, {path: parameter}).
    Raises:
      CheckpointError: a given parameter has another shape than the module's.
      ConfigError: what `build` refuses.
    """
    skeleton = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    shapes = nnx.parameters(skeleton)
    shapes = {path: a for path, a in shapes.items() if not of_encoders(path, features)}
    placed = placements(mesh, shapes)
    wrong = [
        f"{path}: {given[path].shape}, needed {a.shape}"
        for path, a in shapes.items()
        if path in given and given[path].shape != a.shape
    ]
    if wrong:
        raise CheckpointError(
            "the parameters to start from do not fit config.model:\n  " + "\n  ".join(wrong)
        )
    missing = {path: placed[path] for path in shapes if path not in given}

    def fresh():
        arrays = nnx.parameters(build(config, rngs=nnx.Rngs(config.seed)))
        return {path: arrays[path] for path in missing}

    arrays = jax.jit(fresh, out_shardings=missing)()
    for path in shapes:
        if path in given:  # taken out, so that a large model is not held twice
            arrays[path] = jax.device_put(given.pop(path), placed[path])
    return skeleton, {path: arrays[path] for path in shapes}


def summary(trained: dict, frozen: dict) -> list[str]:
    """Lines that say which parts are trained and which are frozen, with their numbers of parameters."""
    lines = []
    frozen = {path: a for path, a in frozen.items() if not path.endswith("/kernel_scale")}
    for name, arrays in (("trained", trained), ("frozen", frozen)):
        for part in sorted(set(map(part_of, arrays))):
            count = sum(a.size for path, a in arrays.items() if part_of(path) == part)
            lines.append(f"{name:8} {part:16} {count:>15,}")
    return lines


def starting(config: TrainConfig, mesh, given: dict, features=()) -> tuple[dict, dict]:
    """(trained, frozen): the parameters before the first step, in the dtypes that a run keeps them in.

    Arguments and errors as in `fill`. What is trained, frozen and left out is printed.
    """
    skeleton, arrays = fill(config, mesh, given, features)
    trained, frozen = (
        {path: arrays[path] for path in half if path in arrays}
        for half in freeze.split(config.train_parts, nnx.parameters(skeleton))
    )
    del arrays  # so that no kernel is held both as it was and as integers
    lines = [f"left out {name}/encoders: the data hold what they would make" for name in features]
    print("\n".join(summary(trained, frozen) + lines), flush=True)
    trained = cast(trained, jnp.float32)
    frozen = cast(lora.quantised(frozen, config.lora.base), jnp.dtype(config.compute_dtype))
    frozen = jax.device_put(frozen, placements(mesh, frozen))
    return trained, frozen


def streams(batches) -> tuple[str, ...]:
    """The streams whose media the batches hold as features of their encoders."""
    made = getattr(batches, "features", None)
    return tuple(made["streams"]) if made else ()


def begin(program: Program, trained: dict) -> TrainState:
    """The state before the first step."""
    placed = jax.tree.map(lambda a: a.sharding, program.state)
    return jax.jit(lambda p: init_state(program.optimizer, p), out_shardings=placed)(trained)
