"""Factors of a 7B decoder on one device of 24 GB: bytes of what is kept, and of the step as compiled."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import pytest
from configs import sft_lora
from conftest import run_command

from omnifusion_jax.models import lora
from omnifusion_jax.models.omnifusion import cast
from omnifusion_jax.nn import nnx
from omnifusion_jax.training import freeze
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.program import build
from omnifusion_jax.training.step import init_state


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


def test_the_step_fits_24_gb(tmp_path):
    """Compiled for one chip of TPU v6e, one row of 2048 tokens at a time."""
    pytest.importorskip("libtpu", reason="the TPU compiler (jax[tpu]) is not installed")
    file = tmp_path / "plan.json"
    run_command("plan", "--config=sft_lora", "--topology=v6e-1", "--rows=1", f"--json={file}")
    used = json.loads(file.read_text())["total"]
    print(f"{used / 2**30:.2f} GiB")
    assert 4e9 < used < 22e9  # of 24: what the device keeps for itself is left
