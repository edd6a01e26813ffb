"""Gradients of kernels, summed over devices at once and in two stages: against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from omnifusion_jax import sharding
from omnifusion_jax.nn.linear import product


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("cut", [None, (2, 2, 2), (2, 1, 4)])
def test_the_gradient_of_a_kernel(monkeypatch, cut, rows):
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(data=2, fsdp=4)
    monkeypatch.setattr(sharding, "stages", lambda rows: cut)
    x, dy = rng.normal(size=(rows, 3, 4, 2)), rng.normal(size=(rows, 3, 12))
    kernel = rng.normal(size=(4, 2, 12))
    spread = lambda a, *axes: jax.device_put(jnp.float32(a), NamedSharding(mesh, PartitionSpec(*axes)))
    with jax.set_mesh(mesh):
        back = jax.jit(lambda x, kernel, dy: jax.vjp(lambda k: product(x, k, 2), kernel)[1](dy)[0])
        found = back(
            spread(x, ("data", "fsdp")), spread(kernel, None, None, "fsdp"), spread(dy, ("data", "fsdp"))
        )
    np.testing.assert_allclose(found, np.einsum("btij,bto->ijo", x, dy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "data", "fsdp", "rows", "cut"),
    [
        ("tpu", 1, 256, 512, (1, 16, 16)),
        ("tpu", 2, 128, 256, (2, 16, 8)),
        ("tpu", 1, 96, 96, (1, 16, 6)),
        ("tpu", 1, 32, 32, None),  # a ring
        ("tpu", 1, 256, 1, None),  # one row, on all
        ("gpu", 1, 256, 512, None),
    ],
)
def test_many_chips_of_a_tpu_sum_in_two_stages(platform, data, fsdp, rows, cut):
    device = AbstractDevice(device_kind="", num_cores=None, platform=platform)
    names = ("data", "fsdp", "tensor")
    mesh = AbstractMesh((data, fsdp, 1), names, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.stages(rows) == cut


def test_without_a_mesh_there_is_nothing_to_sum():
    assert sharding.stages(256) is None
