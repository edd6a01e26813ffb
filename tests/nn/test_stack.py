"""What is kept of a layer for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import PartitionSpec

from omnifusion_jax import sharding
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.linear import Linear
from omnifusion_jax.nn.stack import REMAT, offloads, run_stack

DEPTH, ROWS, WIDTH = 8, 4, 16


class Layer(nnx.Module):
    def __init__(self, *, rngs):
        self.up, self.down = Linear(WIDTH, 4 * WIDTH, rngs=rngs), Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


def stack():
    return nnx.stacked(lambda rngs: Layer(rngs=rngs), DEPTH, nnx.Rngs(0))


def loss(stack, x, remat):
    y, _ = run_stack(stack, x, lambda layer, x, _: (layer(x), None), remat=remat)
    return jnp.square(y).sum()


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_gradients_are_the_same_whatever_is_kept(remat):
    layers, x = stack(), jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, WIDTH)), jnp.float32)
    if remat == "offload" and not offloads(jax.devices()[0]):
        pytest.skip("these devices have no memory of the host")
    gradient = lambda remat: jax.jit(jax.grad(lambda s: loss(s, x, remat)))(layers)
    for ours, theirs in zip(jax.tree.leaves(gradient(remat)), jax.tree.leaves(gradient("none")), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # without a TPU
def test_offloaded_inputs_wait_in_the_memory_of_the_host():
    """In the program that the TPU compiler makes, which has no other use for that memory."""
    pytest.importorskip("libtpu", reason="the TPU compiler (jax[tpu]) is not installed")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = sharding.make_mesh(devices=devices)
    whole = sharding.replicated(mesh)
    layers = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), nnx.eval_shape(stack)
    )
    spread = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((512, WIDTH), jnp.float32, sharding=spread)
    found = {}
    for remat in ("full", "offload"):
        step = jax.jit(jax.grad(lambda s, x, remat=remat: loss(s, x, remat)))
        with jax.set_mesh(mesh):
            found[remat] = step.lower(layers, x).compile()
    host = {name: program.memory_analysis().host_temp_size_in_bytes for name, program in found.items()}
    kept = DEPTH * 512 * WIDTH * 4 // 4  # a chip has a quarter of the rows
    assert host["full"] == 0 and host["offload"] >= kept
    assert "S(5)" in found["offload"].as_text() and "S(5)" not in found["full"].as_text()
