"""A training step with splash attention, compiled for a TPU on a machine without one."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# Of both parts: the forward pass, and the gradients of queries and of keys and values
KERNELS = {
    f"splash_mha_{phase}"
    for phase in ("fwd_segmented_residuals", "dq_segmented_no_residuals", "dkv_segmented_no_residuals")
}


@pytest.mark.sweep
def test_a_packed_step_compiles_for_a_tpu_with_splash():
    """In a process of its own, since the TPU compiler knows other flags."""
    pytest.importorskip("libtpu", reason="the TPU compiler (jax[tpu]) is not installed")
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": "",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other tests compile for TPUs too
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
        "JAX_MEMORY_FITTING_EFFORT": "-1.0",
    }
    code = "from training import test_splash_on_tpu; test_splash_on_tpu.compile_a_step()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    line, *called = done.stdout.splitlines()
    assert line == (
        "attention: splash (10 x 10, head_dim 64, bfloat16); "
        "dense (9 x 9, head_dim 64, dropout 0.1, bfloat16; splash has no dropout); "
        "splash (300 x 300, head_dim 128, causal, packed, window 100, bfloat16); "
        "cudnn is for gpu; triton is for gpu"
    )
    assert set(called) == KERNELS


def compile_a_step():
    """Prints which kernels were chosen, and the names of those that the compiled program calls."""
    import jax
    import numpy as np
    import optax
    import tiny
    from jax.experimental import topologies

    from omnifusion_jax import sharding
    from omnifusion_jax.batch import Form, over, size
    from omnifusion_jax.models.axes import placements
    from omnifusion_jax.models.omnifusion import abstract
    from omnifusion_jax.nn import nnx
    from omnifusion_jax.nn.attend import Choice
    from omnifusion_jax.tables import OBJECTIVES
    from omnifusion_jax.training.step import batch_sharding, init_state, make_step

    c = tiny.config()
    c.decoder.layers = c.image.encoders[0].layers = 1
    c.image.encoders[0].feature_layer = -1
    c.decoder.width, c.decoder.head_dim, c.decoder.window = 128, 128, 100
    c.image.encoders[0].width = c.image.encoders[0].heads * 64
    c.image.adapter.heads = c.image.encoders[0].heads
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = sharding.make_mesh(fsdp=2, tensor=2, devices=topology.devices)
    on_chips = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    skeleton, optimizer = abstract(c), optax.sgd(0.1)
    arrays = nnx.parameters(skeleton)
    arrays = jax.tree.map(on_chips, arrays, placements(mesh, arrays))
    form, tiles = Form(rows=4, length=300, pools=2, room={"image": 3}), tiny.tiles(24, rows=9)
    batch = over(form, tiles, np.zeros(size(form, tiles), np.uint8))
    batch = jax.tree.map(lambda a: on_chips(a, batch_sharding(mesh)), batch)
    step = make_step(
        skeleton,
        OBJECTIVES["answers"],
        optimizer,
        seed=0,
        grad_accum=1,
        dtype=np.dtype("bfloat16"),
        remat="full",
        attention=Choice.of("auto", mesh.devices.flat[0].platform, packed=True, tell=print),
    )
    state = jax.eval_shape(lambda p: init_state(optimizer, p), arrays)._replace(params=arrays)
    with jax.set_mesh(mesh):
        text = jax.jit(step).lower(state, {}, batch).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    print(*sorted(set(re.findall(r"splash_\w+", "\n".join(calls)))), sep="\n")
