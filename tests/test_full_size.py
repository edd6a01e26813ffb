"""Published sizes: shapes, and the real training step compiled for a TPU slice, without either in memory."""

import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from configs import sft
from configs.report import table5
from omnifusion_jax import sharding
from omnifusion_jax.batch import Batch
from omnifusion_jax.data.pictures import ImageProcessor
from omnifusion_jax.models.axes import axes, placements
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import freeze
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.step import init_state, make_step, state_shardings


def count(arrays, part):
    return sum(math.prod(a.shape) for path, a in arrays.items() if path.startswith(part))


def test_published_parameter_counts():
    arrays = nnx.parameters(abstract(preset("omnifusion-1.1")))
    assert count(arrays, "image/adapter/") == 12_598_272
    assert count(arrays, "decoder/") == 7_241_732_096
    assert count(arrays, "special/") == 4 * 4096
    assert count(arrays, "image/encoders/") == 303_507_456  # CLIP-ViT-L/14-336's vision tower
    assert all(axes(path) for path in arrays)


CONFIGS = {  # the first phase with two encoders is that with one, and more
    "sft": sft.get_config(),
    "two encoders, all layers": table5.get_config("sum"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_compiles_for_a_tpu_slice(name):
    """v5e, 64 chips of 16 GB: the whole step with optimizer, at full batch and length, fits.

    In a process of its own, whose gigabytes end with it. The compiler looks less far for a fast schedule, and
    for a small one, which takes less than a quarter of the time and finds the same memory to a tenth.
    """
    pytest.importorskip("libtpu", reason="the TPU compiler (jax[tpu]) is not installed")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": "",
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
        "JAX_MEMORY_FITTING_EFFORT": "-1.0",
    }
    code = f"import test_full_size; print(test_full_size.bytes_a_chip({name!r}))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    used = int(done.stdout.split()[-1])
    print(f"{used / 2**30:.2f} GiB a chip")
    assert 2**30 < used < 15.75 * 2**30


def bytes_a_chip(name):
    """What the compiled step of a config takes on a chip."""
    config = CONFIGS[name]
    mesh = sharding.make_mesh(
        devices=topologies.get_topology_desc(platform="tpu", topology_name="v5e:8x8").devices
    )
    skeleton = abstract(config.model)
    trained, frozen = freeze.split(config.train_parts, nnx.parameters(skeleton))
    optimizer = make_optimizer(config.optimizer, config.steps, config.train_parts)
    state = jax.eval_shape(lambda p: init_state(optimizer, p), trained)
    place = lambda tree, placed: jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placed
    )
    state = place(state, state_shardings(mesh, state))
    frozen = place(
        {path: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16) for path, a in frozen.items()},
        placements(mesh, frozen),
    )
    rows, length, processor = config.batch_size, config.data.max_length, ImageProcessor.of(config.model.image)
    spread = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    plane = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=spread)
    integers = plane(jnp.int32, length)
    accumulate = min(config.grad_accum, rows // mesh.size)  # each micro-batch has a row for every chip
    pools = accumulate * mesh.size  # each with room for the pictures of its rows
    pictures = lambda size: jax.ShapeDtypeStruct(
        (pools, rows // pools * processor.room, size, size, 3), jnp.uint8, sharding=spread
    )
    batch = Batch(
        integers,
        integers,
        integers,
        plane(jnp.float32, length),
        integers,
        integers,
        plane(jnp.int32),
        {"image": tuple(pictures(view.size) for view in processor.views)},
    )
    step = make_step(
        skeleton,
        OBJECTIVES["answers"],
        optimizer,
        seed=0,
        grad_accum=accumulate,
        dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
    )
    with jax.set_mesh(mesh):
        memory = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
