"""Several dialogues a row: the same losses and gradients as one a row, whatever media they have."""

import functools

import jax
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from omnifusion_jax.batch import collate
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn.choice import Choice, Kernel
from omnifusion_jax.nn.kernels import splash, triton
from omnifusion_jax.tables import KERNELS, OBJECTIVES
from omnifusion_jax.training.step import init_state, make_step

SHOWN = (0, 1, 2, 0, 1, 0, 0, 3)  # pictures of each dialogue
ROWS = ([5, 2], [0, 1, 3], [7], [4, 6])  # dialogues of each packed row


def samples(c, tokenizer):
    rng = np.random.default_rng(0)
    prepare = Prepare.of(tokenizer, c, 256)
    for i, shown in enumerate(SHOWN):
        pictures = rng.integers(0, 256, (shown, 24, 24 + 8 * i, 3), np.uint8)
        answer = "A red circle." if i % 2 else "A blue square. It is blue."
        yield prepare(
            tiny.dialogue((("user", "What?" + "<image>" * shown), ("assistant", answer)), *pictures)
        )


def stepped(c, batch, accumulate, attention="dense"):
    """(metrics, gradients) of a step that trains everything."""
    arrays = {path: jax.numpy.asarray(a) for path, a in tiny.arrays(c).items()}
    settings = {"seed": 0, "grad_accum": accumulate, "dtype": np.dtype("float32"), "remat": "none"}
    step = make_step(abstract(c), OBJECTIVES["answers"], tiny.RECORDER, attention=attention, **settings)
    step = jax.jit(step)
    state, metrics = step(init_state(tiny.RECORDER, arrays), {}, batch)
    assert not metrics.pop("broken").any()
    return {name: float(value) for name, value in metrics.items()}, state.optimizer


@pytest.mark.parametrize("looks", ["one encoder", "window", "two encoders", "tiles"])
def test_packed_equals_unpacked(tokenizer, looks):
    c = tiny.looking(looks)
    c.decoder.window = 5 if looks == "window" else None
    made = list(samples(c, tokenizer))
    tiles = Prepare.of(tokenizer, c, 256).tiles
    alone = collate(made, max(len(sample.tokens) for sample in made), tiles)
    rows = [[made[i] for i in row] for row in ROWS]
    length = max(sum(len(sample.tokens) for sample in row) for row in rows)
    packed = collate(rows, length + 3, tiles, pools=2, usual=4)
    expected, gradients = stepped(c, alone, 1)
    found, theirs = stepped(c, packed, 2)
    assert found == pytest.approx(expected, rel=2e-5)
    assert (found["images"], found["tokens"]) == (sum(SHOWN), sum(len(sample.tokens) for sample in made))
    for path, gradient in gradients.items():
        scale = np.abs(gradient).max()
        # softmax does not see what is added to all keys, and the last layer of an encoder is not looked at
        told = path.endswith("key/bias") or path.startswith("image/encoders") or looks == "window"
        assert scale > 1e-6 or told, path
        assert_allclose(theirs[path], gradient, atol=2e-5 * scale + 1e-8, rtol=0, err_msg=path)


@pytest.mark.parametrize(
    "name, run, looks",
    [
        ("splash", splash.splash, "two encoders"),
        pytest.param("triton", triton.triton, "one encoder", marks=pytest.mark.sweep),
    ],
)
def test_a_fused_kernel_changes_nothing(tokenizer, monkeypatch, name, run, looks):
    """Packed rows of a whole model, in which no attention is dense, forward or backward."""
    c = tiny.looking(looks)
    c.decoder.window = 5 if name == "splash" else None
    made = list(samples(c, tokenizer))
    rows = [[made[i] for i in row] for row in ROWS]
    length = max(sum(len(sample.tokens) for sample in row) for row in rows)
    packed = collate(rows, length, Prepare.of(tokenizer, c, 256).tiles, pools=2, usual=4)
    expected, gradients = stepped(c, packed, 2)
    choice, refuses = Choice(name), KERNELS[name].refuses
    in_float32 = lambda need: refuses(need._replace(dtype="bfloat16"))  # as these tests run
    monkeypatch.setitem(KERNELS, name, Kernel(functools.partial(run, interpret=True), in_float32))
    monkeypatch.delitem(KERNELS, "dense")
    found, theirs = stepped(c, packed, 2, choice)
    assert {need.hidden for need in choice.taken} == {"later", "nothing"}
    assert found == pytest.approx(expected, rel=2e-5)
    for path, gradient in gradients.items():
        scale = np.abs(gradient).max()
        assert_allclose(theirs[path], gradient, atol=5e-5 * scale + 1e-8, rtol=0, err_msg=path)
