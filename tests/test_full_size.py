"""Published sizes: shapes, and the real training step compiled for a TPU slice, without either in memory."""

import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from omnifusion_jax.models.axes import axes
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.models.presets import preset
from omnifusion_jax.nn import nnx


def count(arrays, part):
    return sum(math.prod(a.shape) for path, a in arrays.items() if path.startswith(part))


def test_published_parameter_counts():
    arrays = nnx.parameters(abstract(preset("omnifusion-1.1")))
    assert count(arrays, "image/adapter/") == 12_598_272
    assert count(arrays, "decoder/") == 7_241_732_096
    assert count(arrays, "special/") == 4 * 4096
    assert count(arrays, "image/encoders/") == 303_507_456  # CLIP-ViT-L/14-336's vision tower
    assert all(axes(path) for path in arrays)


def plan(config, place, tmp_path, *flags):
    """The figures of a plan, made in a process of its own, whose gigabytes end with it."""
    pytest.importorskip("libtpu", reason="the TPU compiler (jax[tpu]) is not installed")
    command = [sys.executable, "-m", "omnifusion_jax.plan", f"--config={config}", f"--topology={place}"]
    command += [f"--json={tmp_path / 'plan.json'}", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return json.loads((tmp_path / "plan.json").read_text())


def received(found, *names):
    """GiB that a chip receives in a step by exchanges whose names begin like this."""
    return sum(size for name, (_, size) in found["exchanges"].items() if name.startswith(names)) / 2**30


def weights_of_a_step():
    """GiB of the trained parameters in bytes of one each."""
    trained = nnx.parameters(abstract(preset("omnifusion-1.1")))
    return sum(a.size for path, a in trained.items() if "encoders" not in path) / 2**30


def test_the_packed_second_phase_fits_a_pod_which_exchanges_what_it_must(tmp_path):
    """v5e, 256 chips of 16 GB: the whole step with optimizer, at full batch and length."""
    found, weights = (
        plan("sft", "v5e-256", tmp_path, "--rows=1", "--config.data.packing=true"),
        weights_of_a_step(),
    )
    assert found["place"] == "v5e-256" and found["fits"] and 2**30 < found["total"] < 3 * 2**30
    assert (found["devices"], found["rows"], found["length"]) == (256, 256, 2048)
    # Every gradient is summed to where it lies, in float32, in two stages of 16 chips. In the second, which
    # is of a sixteenth, the compiler sums some kernels on all of its chips.
    sums = received(found, "reduce-scatter", "collective-permute f32")
    assert 0.9 * 4 * weights < sums < 1.2 * 4 * weights
    assert received(found, "all-reduce") < 2 * 4 * weights / 16
    assert received(found, "all-reduce bf16", "reduce-scatter bf16", "reduce-scatter ring bf16") < 0.01 * sums
    # Weights are gathered in bfloat16, for the pass forward, that again, and that backward; nothing else is.
    assert received(found, "all-gather", "collective-permute bf16") < 1.1 * 3 * 2 * weights
    assert received(found, "all-to-all") < 0.01 * sums  # rows of the embedding


@pytest.mark.sweep
def test_sixteen_chips_take_two_rows_each_and_exchange_what_they_must(tmp_path):
    found, weights = plan("sft", "v5e-16", tmp_path, "--rows=2"), weights_of_a_step()
    assert found["fits"] and (found["rows"], found["length"]) == (32, 2048)
    times = 4  # micro-batches of a step
    # Rows of the embedding travel, not its table.
    sums = received(found, "reduce-scatter", "collective-permute f32")
    assert 0.9 * 4 * weights * times < sums < 1.2 * 4 * weights * times
    assert received(found, "all-reduce", "all-to-all") < 0.02 * sums
    gathered = received(found, "all-gather", "collective-permute bf16")
    assert gathered < 1.1 * 3 * 2 * weights * times
