"""How arrays are spread: a golden file of every parameter, and meshes."""

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.experimental import topologies

from omnifusion_jax import sharding
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.models.axes import AXES, axes

GOLDEN = Path(__file__).parent / "golden" / "partition_specs.json"


def specs():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    row = lambda path, a: [*map(str, a.shape), str(sharding.spec(mesh, axes(path), a.shape))]
    return {
        name: {path: row(path, a) for path, a in arrays.items()} for name, arrays in tiny.systems().items()
    }


def test_partition_specs_are_those_of_the_golden_file():
    """To accept a change: python tests/test_sharding.py"""
    assert specs() == json.loads(GOLDEN.read_text())


def test_the_golden_file_has_every_kind_of_parameter():
    paths = {path for rows in json.loads(GOLDEN.read_text()).values() for path in rows}
    assert not [pattern for pattern, _ in AXES if not any(re.fullmatch(pattern, path) for path in paths)]


def test_large_arrays_are_all_spread():
    for rows in specs().values():
        for path, (*shape, spec) in rows.items():
            assert math.prod(map(int, shape)) < 2**20 or "fsdp" in spec, path


def test_a_mesh_takes_the_devices_it_needs():
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert dict(sharding.make_mesh(data=-1, fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert sharding.make_mesh(data=1, fsdp=1).devices.tolist() == [[[jax.devices()[0]]]]
    unfit = ({"data": 3}, {"fsdp": 16}, {"data": 16}, {"tensor": 3}, {"data": -1, "fsdp": -1, "tensor": 3})
    for sizes in unfit:
        with pytest.raises(ConfigError, match="does not fit 8 devices"):
            sharding.make_mesh(**sizes)


class Device:
    """What is asked of a device here; `jax.devices()` has those of one process."""

    platform = device_kind = "cpu"

    def __init__(self, number, hosts, of=8):
        self.id, self.process_index = number, number * hosts // of


def spread(order, shape, hosts=2):
    devices = np.array([Device(i, hosts, len(order)) for i in order], object)
    return jax.sharding.Mesh(devices.reshape(shape), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("order", "shape", "rows", "owners"),
    [
        (range(8), (2, 4, 1), [range(8), range(8, 16)], [0, 1]),
        (
            (0, 1, 4, 5, 2, 3, 6, 7),
            (1, 8, 1),
            [(0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)],
            [0, 1],
        ),
        (range(8), (1, 1, 8), [range(16)] * 2, [0]),
        ((0, 4, 1, 5, 2, 6, 3, 7), (1, 4, 2), [range(16)] * 2, [0]),
    ],
)
def test_a_host_has_the_rows_of_its_own_devices(order, shape, rows, owners):
    found = sharding.shares(spread(order, shape), 16)
    assert found == list(map(tuple, rows)) and sharding.owners(found) == owners


def test_rows_that_hosts_cannot_share_are_refused():
    with pytest.raises(ConfigError, match="12 rows cannot be shared evenly by 8 devices"):
        sharding.shares(spread(range(8), (8, 1, 1)), 12)
    with pytest.raises(ConfigError, match="some rows in common, others not"):
        sharding.shares(spread(range(8), (1, 2, 4), hosts=3), 16)
    with pytest.raises(ConfigError, match="some rows in common, others not"):  # those of the pair between
        sharding.shares(spread(range(6), (3, 1, 2)), 12)
    assert sharding.shares(sharding.make_mesh(), 12) == [tuple(range(12))]  # one process has all


def test_no_host_is_left_out_of_a_mesh():
    devices = [Device(i, 2) for i in range(8)]
    with pytest.raises(ConfigError, match="takes 4 of 8 devices and none of hosts 1"):
        sharding.make_mesh(fsdp=4, devices=devices)
    with pytest.raises(ConfigError, match="3 groups cannot share 2 hosts evenly"):
        sharding.slices(devices, 3, 6)
    with pytest.raises(ConfigError, match="2 groups cannot share 3 hosts evenly"):
        sharding.slices([Device(i, 3, 6) for i in range(6)], 2, 6)


def test_groups_of_hosts_hold_copies_of_their_own():
    assert dict(sharding.make_mesh(dcn_data=2).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert dict(sharding.make_mesh(dcn_data=2, data=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(ConfigError, match="2 groups cannot share 1 copies evenly"):
        sharding.make_mesh(dcn_data=2, data=-1, fsdp=8)


def test_two_slices_of_a_tpu_are_joined_along_the_axis_data(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other tests compile for TPUs too
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no machine with TPUs is near
    devices = topologies.get_topology_desc("v5e:4x4", "tpu", num_slices=2).devices
    mesh = sharding.make_mesh(dcn_data=2, data=2, tensor=4, devices=devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 4}
    assert [{d.slice_index for d in copy.flat} for copy in mesh.devices] == [{0}, {0}, {1}, {1}]
    found = sharding.shares(mesh, 16)  # four chips a host: two hosts share the rows of an axis tensor of four
    assert len(found) == 8 and [found.count(share) for share in found] == [2] * 8
    with pytest.raises(ConfigError, match=r"mesh\.dcn_data is 1, but the number of slices is 2"):
        sharding.make_mesh(devices=devices)


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(fsdp=8)
    assert sharding.spec(mesh, ["width", "mlp"], (16, 6)) == jax.sharding.PartitionSpec("fsdp", None)
    assert sharding.spec(mesh, ["width", "mlp"], (12, 6)) == jax.sharding.PartitionSpec(None, None)
    both = sharding.make_mesh(data=2, fsdp=4)  # a batch goes over the two of them
    assert sharding.spec(both, ["batch"], (8,)) == jax.sharding.PartitionSpec(("data", "fsdp"))
    assert sharding.spec(both, ["batch"], (6,)) == jax.sharding.PartitionSpec(None)


def test_where_a_width_does_not_divide_the_width_of_the_feed_forward_part_is_cut():
    mesh, spec = sharding.make_mesh(fsdp=8), jax.sharding.PartitionSpec
    names = ["layers", "vision_mlp", "vision_embed"]
    assert sharding.spec(mesh, names, (2, 32, 16)) == spec(None, None, "fsdp")
    assert sharding.spec(mesh, names, (2, 32, 12)) == spec(None, "fsdp", None)
    assert sharding.spec(mesh, names, (2, 12, 12)) == spec(None, None, None)


def test_a_parameter_that_no_row_knows_is_named():
    with pytest.raises(ConfigError, match=r"image/adapter/mine: 0 rows of models\.axes\.AXES match"):
        axes("image/adapter/mine")
    AXES.append((r"image/adapter/mine", "_ width"))
    try:
        assert axes("image/adapter/mine") == ["_", "width"]
    finally:
        AXES.pop()


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    lines = lambda rows: ",\n".join(f"  {json.dumps(path)}: {json.dumps(row)}" for path, row in rows.items())
    GOLDEN.write_text(
        "{\n"
        + ",\n".join(f" {json.dumps(name)}: {{\n{lines(rows)}\n }}" for name, rows in specs().items())
        + "\n}\n"
    )
