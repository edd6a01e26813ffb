"""The program that writes answers, compiled for TPU chips: what a token takes of them."""

import collections
import importlib.util

import jax
import pytest

from omnifusion_jax import shipped
from omnifusion_jax.planning import hlo, programs, topology
from omnifusion_jax.sharding import make_mesh

pytestmark = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")  # without a TPU
ROWS, LENGTH, LAYERS, CHIPS = 128, 2048 + 64, 1, 4  # LENGTH: a prompt and its answer
WIDTH, MLP, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 32000  # of a decoder of 7B


@pytest.fixture(scope="module")
def program():
    """A step of a layer of the published decoder on four chips, heads spread over them."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler (jax[tpu]) is not installed")
    config = shipped.load("sft")
    config.model.decoder.layers, config.batch_size, config.grad_accum = LAYERS, ROWS, 1
    mesh = make_mesh(fsdp=1, tensor=CHIPS, devices=topology.tpu(f"v5e-{CHIPS}").devices)
    work = programs.decode_step(config.validate(), mesh)
    with jax.set_mesh(mesh):
        return work.lower().compile()


def test_it_is_given_weights_and_cache_and_keeps_no_copy(program):
    layer = 2 * WIDTH * HEADS * HEAD_DIM + 2 * WIDTH * KV_HEADS * HEAD_DIM + 3 * WIDTH * MLP
    weights, cache = LAYERS * layer + 2 * WIDTH * VOCAB, 2 * LAYERS * ROWS * KV_HEADS * LENGTH * HEAD_DIM
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == pytest.approx(2 * (weights + cache) / CHIPS, rel=0.01)
    assert memory.alias_size_in_bytes >= 2 * cache / CHIPS  # it is returned where it was
    assert memory.temp_size_in_bytes < cache / CHIPS  # the keys of a layer


def test_a_token_reads_keys_and_values_once_and_copies_none(program):
    """Rows are written one after the other, in loops that change one array of the cache each.

    The kernel of attention takes these as they lie.
    """
    cache = f"bf16[{ROWS},{KV_HEADS // CHIPS},{LENGTH},{HEAD_DIM}]"
    computations, _ = hlo.parsed(program.as_text())
    taken = collections.Counter()  # kinds of operations that are given keys or values of all rows
    for operations in computations.values():
        types = {operation.name: operation.type for operation in operations}
        taken.update(operation.kind for operation in operations if cache in hlo.operands(operation, types))
    assert taken["dynamic-update-slice"] == taken["bitcast"] == 2 * LAYERS
    copies = ("copy", "slice", "transpose", "async", "convolution")
    assert not {kind for kind in taken if kind.startswith(copies)}
    assert program.as_text().count('custom_call_target="tpu_custom_call"') == LAYERS


def test_rows_of_a_window_are_a_ring():
    """Of the window and two pieces of a prompt, as an engine makes them."""
    config = shipped.load("sft")
    config.model.decoder.layers, config.model.decoder.window = LAYERS, 256
    state = programs.state_of(config.validate(), make_mesh(fsdp=1, devices=jax.devices()[:1]))
    assert {a.shape[2] for a in jax.tree.leaves(state.cache)} == {256 + 2 * 512}
