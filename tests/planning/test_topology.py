"""Names of devices."""

import importlib.util

import pytest

from omnifusion_jax.chips import CHIPS, chip_of
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.planning import topology

COMPILER = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (jax[tpu]) is not installed"
)
SLICES = {
    "v4-32": 16,
    "v5e-16": 16,
    "v5e-256": 256,
    "v5p-16": 8,
    "v5p-256": 128,
    "v6e-1": 1,
    "v6e-16": 16,
    "v6e-256": 256,
}


@COMPILER
@pytest.mark.parametrize("name", [*SLICES, "v5e:4x4"])
def test_slices_have_the_chips_that_are_rented_under_their_name(name):
    place = topology.tpu(name)
    assert (
        len({tuple(device.coords) for device in place.devices}) == len(place.devices) == SLICES.get(name, 16)
    )
    assert chip_of(place.devices[0].device_kind) == place.chip == CHIPS[name.replace(":", "-").split("-")[0]]
    assert place.exact


@pytest.mark.parametrize("name", ["v5e-17", "v4-9", "v5p-17", "v7x-16", "v4-16x", "tpu", "v5e", "v5e-0"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match=r"there is no TPU slice '.*'; (choose from|there are) v"):
        topology.tpu(name)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"libtpu.* is not installed: pip install 'jax\[tpu\]'"):
        topology.tpu("v5e-16")


@pytest.mark.parametrize("name", ["gpu", "gpu:80", "cpu", "t4", "v5e", "gpu:80GBx"])
def test_other_gpus_are_refused(name):
    with pytest.raises(ConfigError, match=r"write gpu:80GB or a100, h100, h200; h100x8 are eight"):
        topology.gpu(name)


def test_chips_are_told_apart_by_what_jax_calls_them():
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100"}
    for kind, name in kinds.items():
        assert chip_of(kind) == CHIPS[name]
    assert chip_of("cpu") is None
