"""Ten steps of the program of a run, on every kind of mesh: the same losses, the same parameters."""

import functools
import itertools

import jax
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from omnifusion_jax import sharding
from omnifusion_jax.batch import collate
from omnifusion_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.training import freeze
from omnifusion_jax.training.program import make_program
from omnifusion_jax.training.step import batch_sharding, init_state

STEPS, ROWS = 10, 8
# how the model looks at pictures, whether its head is tied, dialogues a row
LOOKS = list(itertools.product(("one encoder", "two encoders"), (False, True), (1, 2)))
ONE, TWO = ("one encoder", False, 1), ("two encoders", True, 2)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]  # data, fsdp, tensor
FEW = [(ONE, (8, 1, 1)), (TWO, (2, 2, 2))]
ALL = [
    pytest.param(look, mesh, marks=() if (look, mesh) in FEW else pytest.mark.sweep)
    for look in LOOKS
    for mesh in MESHES
]


def config(look, mesh, **settings):
    looks, tied, _ = look
    c = TrainConfig(
        model=tiny.looking(looks),
        mesh=MeshConfig(*mesh),
        steps=STEPS,
        batch_size=ROWS,
        train_parts=((".*", 1.0),),
        compute_dtype="float32",
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup=0.0, weight_decay=0.1),
        data=DataConfig(path="pictures", max_length=160),
        **settings,
    )
    c.model.decoder.tied = tied
    return c.validate()


def batches(c, tokenizer, dialogues, pools):
    """A batch for each step, of random pictures; every third dialogue has none."""
    rng, prepare = np.random.default_rng(0), Prepare.of(tokenizer, c.model, 160)
    for step in range(STEPS):
        samples = []
        for i in range(ROWS * dialogues):
            pictures = rng.integers(0, 256, (int(i % 3 > 0), 24, 24, 3), np.uint8)
            answer = "A red circle." if (i + step) % 2 else "A blue square. It is to the left."
            turns = (("user", "What?" + "<image>" * len(pictures)), ("assistant", answer))
            samples.append(prepare(tiny.dialogue(turns, *pictures)))
        rows = [samples[i : i + dialogues] for i in range(0, len(samples), dialogues)]
        yield collate(rows, 160, prepare.tiles, pools=pools, usual=dialogues)


def run(look, mesh, tokenizer, **settings):
    """(losses, parameters) after all steps."""
    c = config(look, mesh, **settings)
    devices = sharding.make_mesh(**vars(c.mesh))
    program = make_program(c, devices)
    trained, frozen = freeze.split(c.train_parts, tiny.arrays(c.model))
    state = jax.device_put(
        init_state(program.optimizer, trained), jax.tree.map(lambda a: a.sharding, program.state)
    )
    losses = []
    pools = c.grad_accum * sharding.ways(devices, "batch")
    with jax.set_mesh(devices):
        for batch in batches(c, tokenizer, look[2], pools):
            batch = jax.device_put(batch, batch_sharding(devices))
            state, metrics = program.step(state, frozen, batch)
            losses.append(metrics["loss"])
    return np.asarray(losses), jax.device_get(state.params)


@functools.cache
def on_one_device(look, tokenizer):
    return run(look, (1, 1, 1), tokenizer)


@pytest.mark.parametrize(("look", "mesh"), ALL)
def test_every_mesh_gives_the_same_losses_and_parameters(tokenizer, look, mesh):
    same_as_on_one_device(look, tokenizer, run(look, mesh, tokenizer))


def test_a_sequence_that_is_spread_between_layers_gives_the_same(tokenizer):
    same_as_on_one_device(ONE, tokenizer, run(ONE, (2, 2, 2), tokenizer, spread_sequence=True))


def same_as_on_one_device(look, tokenizer, found):
    losses, params = on_one_device(look, tokenizer)
    assert losses[-1] < losses[0]
    assert_allclose(found[0], losses, rtol=1e-5)
    for path, a in params.items():
        # softmax does not see what is added to all keys: the gradient is rounding, and Adam makes it a step
        if not path.endswith("attention/key/bias"):
            assert_allclose(found[1][path], a, atol=1e-5, err_msg=path)
