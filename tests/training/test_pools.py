"""Rows that share a pool of media: the same embeddings, losses and gradients as rows that have one each."""

import jax
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from omnifusion_jax.batch import FEATURE, TEXT, Batch, collate
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.step import init_state, make_step, portions

SHOWN = (0, 1, 2, 0, 1, 0, 0, 3)  # pictures of each row


def dialogues():
    rng = np.random.default_rng(0)
    for i, shown in enumerate(SHOWN):
        pictures = rng.integers(0, 256, (shown, 24, 24 + 8 * i, 3), np.uint8)
        turns = (
            ("user", "What?" + "<image>" * shown),
            ("assistant", "A red circle." if i % 2 else "A blue square."),
        )
        yield tiny.dialogue(turns, *pictures)


def batches(c, tokenizer, *pools, order=range(8)):
    """The same dialogues in other numbers of pools."""
    prepare = Prepare.of(tokenizer, c, 256)
    samples = [prepare(dialogue) for dialogue in dialogues()]
    length = max(len(sample.tokens) for sample in samples)
    samples = [samples[i] for i in order]
    return [collate(samples, length, prepare.tiles, n, usual=prepare.processors["image"].room) for n in pools]


embed = jax.jit(lambda model, batch: model.embed(batch))


@pytest.mark.parametrize("looks", ["one encoder", "two encoders", "tiles"])
def test_pools_change_no_embedding(tokenizer, looks):
    c = tiny.looking(looks)
    model = nnx.with_parameters(abstract(c), tiny.arrays(c))
    one_each, *shared = batches(c, tokenizer, None, 4, 2, 1)
    expected = np.asarray(embed(model, one_each))
    here = one_each.kind == FEATURE
    assert here.any(axis=1).tolist() == [n > 0 for n in SHOWN]
    assert len(np.unique(expected[here].round(4), axis=0)) == here.sum()  # no feature row is like another
    for batch in shared:
        assert_allclose(embed(model, batch), expected, atol=1e-5)


def test_portions_keep_rows_with_their_pools():
    """Every n-th pool with its rows; a row and its pool have one number here."""
    rows = np.arange(8, dtype=np.int32)
    plane = np.repeat(rows[:, None], 3, axis=1)
    numbers = np.arange(4, dtype=np.uint8)
    media = {"image": tuple(np.repeat(numbers[:, None], n, axis=1) for n in (2, 0, 5))}
    batch = Batch(*[plane] * 6, rows, media)
    for n, first in ((1, [[0, 1, 2, 3]]), (2, [[0, 2], [1, 3]]), (4, [[0], [1], [2], [3]])):
        cut = portions(batch, n)
        expected = [[row for pool in pools for row in (2 * pool, 2 * pool + 1)] for pools in first]
        assert cut.items.tolist() == cut.tokens[..., 0].tolist() == cut.weights[..., 2].tolist() == expected
        assert [view.shape for view in cut.media["image"]] == [(n, 4 // n, k) for k in (2, 0, 5)]
        assert cut.media["image"][0][..., 0].tolist() == cut.media["image"][2][..., 4].tolist() == first
    bare = portions(batch._replace(media={}), 2)
    assert bare.items.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


def stepped(c, batch, accumulate):
    """(loss, gradients) of a step that trains everything."""
    arrays = {path: jax.numpy.asarray(a) for path, a in tiny.arrays(c).items()}
    settings = {"seed": 0, "grad_accum": accumulate, "dtype": np.dtype("float32"), "remat": "none"}
    step = jax.jit(make_step(abstract(c), OBJECTIVES["answers"], tiny.RECORDER, **settings))
    state, metrics = step(init_state(tiny.RECORDER, arrays), {}, batch)
    assert metrics["images"] == sum(SHOWN) and metrics["bad"] == 0
    return float(metrics["loss"]), state.optimizer


def test_portions_of_rows_with_and_without_pictures_add_up(tokenizer):
    """Of two portions the first has only rows without pictures, its pool blank; of four each has both."""
    c = tiny.looking("one encoder")
    one, two, eight = batches(c, tokenizer, 1, 2, 8, order=(0, 3, 5, 6, 1, 2, 4, 7))
    assert not two.media["image"][0][0].any() and two.items.tolist() == [0, 0, 0, 0, 1, 2, 1, 3]
    expected, gradients = stepped(c, one, 1)
    assert np.abs(gradients["image/encoders/0/patch/kernel"]).max() > 1e-6
    for batch, accumulate in ((two, 2), (eight, 4)):
        loss, found = stepped(c, batch, accumulate)
        assert_allclose(loss, expected, rtol=1e-5)
        for path, a in gradients.items():
            assert_allclose(found[path], a, atol=2e-5 * max(1e-3, float(np.abs(a).max())), err_msg=path)


@pytest.mark.parametrize("layout", ["omnifusion", "template"])
def test_without_pictures_only_rows_of_tables_are_gathered(tokenizer, layout):
    """No product of matrices is left in the embedding."""
    parts = "{% for p in m.content %}{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
    template = "{% for m in messages %}" + parts + "{% endfor %}"
    c = tiny.looking("one encoder")
    c.layout, c.image_place, c.template = layout, "prefix", template * (layout == "template")
    c.validate()
    model = nnx.with_parameters(abstract(c), tiny.arrays(c))
    (some,) = batches(c, tokenizer, 2, order=(0, 1))
    (none,) = batches(c, tokenizer, 2, order=(0, 3))
    traced = [str(jax.make_jaxpr(lambda m, b: m.embed(b))(model, batch)) for batch in (some, none)]
    assert ["dot_general" in program for program in traced] == [True, False]
    x, text = np.asarray(embed(model, none)), none.kind <= TEXT
    assert_array_equal(x[text], np.asarray(model.decoder.embed_tokens(none.tokens))[text])
    assert text.all() == (layout == "template")
    for row, n in zip(*np.nonzero(~text), strict=True):
        assert_array_equal(x[row, n], getattr(model.special, c.special[none.index[row, n]])[...])
