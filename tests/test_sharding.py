"""How arrays are spread: a golden file of every parameter, and meshes."""

import json
import math
import re
from pathlib import Path

import jax
import pytest
import tiny

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


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(fsdp=8)
    assert sharding.spec(mesh, ["width", "mlp"], (16, 6)) == jax.sharding.PartitionSpec("fsdp", None)
    assert sharding.spec(mesh, ["width", "mlp"], (12, 6)) == jax.sharding.PartitionSpec(None, None)
    both = sharding.make_mesh(data=2, fsdp=4)  # a batch goes over the two of them
    assert sharding.spec(both, ["batch"], (8,)) == jax.sharding.PartitionSpec(("data", "fsdp"))
    assert sharding.spec(both, ["batch"], (6,)) == jax.sharding.PartitionSpec(None)


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
