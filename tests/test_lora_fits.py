"""Factors of a 7B decoder on one device of 24 GB: bytes of what is kept, and of the step as compiled."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from jax.experimental import topologies

from configs import sft_lora
from omnifusion_jax import sharding
from omnifusion_jax.batch import Batch
from omnifusion_jax.data.pictures import ImageProcessor
from omnifusion_jax.models import lora
from omnifusion_jax.models.axes import placements
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training import freeze
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.program import build
from omnifusion_jax.training.step import batch_sharding, init_state, make_step, state_shardings


def size(arrays):
    """Bytes."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays))


@functools.cache
def kept(variant):
    """(config, module, state of the run, frozen), as shapes."""
    config = sft_lora.get_config(variant)
    skeleton = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    trained, frozen = freeze.split(config.train_parts, nnx.parameters(skeleton))
    optimizer = make_optimizer(config.optimizer, config.steps, config.train_parts)
    state = jax.eval_shape(lambda p: init_state(optimizer, p), trained)
    shrink = lambda frozen: cast(lora.quantised(frozen, config.lora.base), jnp.bfloat16)
    return config, skeleton, optimizer, state, jax.eval_shape(shrink, dict(frozen))


@pytest.mark.parametrize(("variant", "bits"), [("", 4.25), ("int8", 8.25)])
def test_bytes_of_what_is_kept(variant, bits):
    """Of 32 layers: kernels of query, key, value, out, gate, up, down, and factors of rank 64 beside them."""
    _, _, _, state, frozen = kept(variant)
    values = 32 * 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3)
    kernels = {path: a for path, a in frozen.items() if re.fullmatch(r"decoder/layers/.*/kernel.*", path)}
    assert size(kernels) == values * bits / 8
    factors = {path: a for path, a in state.params.items() if "/lora_" in path}
    sides = 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert size(factors) == 4 * 64 * sides
    assert size(state) == pytest.approx(3 * size(state.params), rel=1e-3)  # weights and two moments
    whole = size(state) + size(frozen) + size(state.params)  # and gradients
    print(f"{whole / 2**30:.2f} GiB")
    assert whole < {4.25: 8.5, 8.25: 12}[bits] * 1e9


@pytest.mark.sweep
def test_the_step_fits_24_gb():
    """Compiled for one chip of TPU v6e, in a process of its own."""
    pytest.importorskip("libtpu", reason="the TPU compiler (jax[tpu]) is not installed")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": "",
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
        "JAX_MEMORY_FITTING_EFFORT": "-1.0",
    }
    code = "import test_lora_fits; print(test_lora_fits.bytes_of_step(''))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    used = int(done.stdout.split()[-1])
    print(f"{used / 2**30:.2f} GiB")
    assert 4e9 < used < 22e9  # of 24: what the device keeps for itself is left


def bytes_of_step(variant):
    """What the compiled step takes: one row of 2048 tokens at a time."""
    config, skeleton, optimizer, state, frozen = kept(variant)
    chips = topologies.get_topology_desc(
        platform="tpu", topology_name="v6e:1x1", chips_per_host_bounds=[1, 1, 1]
    )
    mesh = sharding.make_mesh(devices=chips.devices)
    place = lambda tree, placed: jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, placed
    )
    rows, length, processor = config.batch_size, config.data.max_length, ImageProcessor.of(config.model.image)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch_sharding(mesh))
    integers = array(jnp.int32, length)
    media = tuple(array(jnp.uint8, processor.room, v.size, v.size, 3) for v in processor.views)
    batch = Batch(
        integers,
        integers,
        integers,
        array(jnp.float32, length),
        integers,
        integers,
        array(jnp.int32),
        {"image": media},
    )
    step = make_step(
        skeleton,
        OBJECTIVES["answers"],
        optimizer,
        seed=0,
        grad_accum=config.grad_accum,
        dtype=jnp.dtype(config.compute_dtype),
        remat=config.remat,
    )
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=0).lower(
            place(state, state_shardings(mesh, state)), place(frozen, placements(mesh, frozen)), batch
        )
        memory = lowered.compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
