"""Models that look at pictures in other ways: as tiles, through two encoders, with turns marked in words."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.batch import FEATURE, SPECIAL
from omnifusion_jax.config import EncoderConfig, GenerationConfig, adapter
from omnifusion_jax.data.describe import describe
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.data.tiles import NEWLINE, order, tiles
from omnifusion_jax.inference import prompts
from omnifusion_jax.inference.model import Model
from omnifusion_jax.models.omnifusion import OmniFusion
from omnifusion_jax.nn import nnx

GREEDY = GenerationConfig(max_new_tokens=4)
SIZES = ((24, 24), (24, 60), (90, 30), (31, 64))  # height, width
SECOND = EncoderConfig(
    image_size=16,
    shortest_edge=20,
    patch=8,
    width=24,
    layers=2,
    heads=2,
    mlp=40,
    class_token=False,
    pre_norm=False,
)


def config(**settings):
    c = tiny.config(**settings)
    c.image.encoders[0].layers, c.decoder.layers, c.decoder.window = 2, 1, None
    c.validate()
    return c


def tiled(**image):
    c = config()
    c.image = dataclasses.replace(c.image, fit="tiles", **image)
    c.validate()
    return c


def two_encoders():
    c = config()
    c.image.encoders, c.image.adapter = (*c.image.encoders, SECOND), adapter("sum", width=16)
    c.validate()
    return c


def ask(picture, text="What is it?"):
    return Request([{"role": "user", "content": text}], images=[picture])


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.mark.parametrize(
    "image", [{}, {"unpad": True, "newline": True}], ids=["grid split", "newline and unpad"]
)
def test_tiles_enter_the_sequence_in_their_order(tokenizer, image):
    """Slot after slot against the adapter's rows for the same tiles, put there by hand."""
    c = tiled(**image)
    model = Model(c, tiny.arrays(c), tokenizer)
    for picture in pictures():
        sample = prompts.lay_out(ask(picture), "here", model.prepare)
        batch = prompts.assemble([sample], model.prepare)
        steps = order(picture.shape[:2], c.image.grids, 24, 3, **image)
        cut = tiles(Image.fromarray(picture), 24, c.image.grids)
        assert batch.media["image"][0].shape[1] == model.prepare.processors["image"].room == 5 and len(
            sample.media["image"][0]
        ) == len(cut)
        rows = np.asarray(model.module.image((jnp.asarray(cut)[None],)))[0]
        embedded = np.asarray(OmniFusion.embed(model.module, batch))[0]
        start = int(np.argmax((batch.kind[0] == SPECIAL) & (batch.index[0] == c.special.index("soi")))) + 1
        slots = embedded[start : start + len(steps)]
        np.testing.assert_allclose(slots[steps != NEWLINE], rows[steps[steps != NEWLINE]], atol=1e-5)
        if image:
            newline = np.asarray(model.module.special.newline[...])
            assert (steps == NEWLINE).sum() >= 3
            np.testing.assert_array_equal(
                slots[steps == NEWLINE],
                np.broadcast_to(newline, (int((steps == NEWLINE).sum()), len(newline))),
            )
        after = start + len(steps)
        assert (batch.kind[0, after], batch.index[0, after]) == (SPECIAL, c.special.index("eoi"))
        assert (batch.kind[0] == FEATURE).sum() == (steps != NEWLINE).sum()


def test_pictures_of_more_and_fewer_tiles_side_by_side(tokenizer):
    """The answers are those that each has alone, however far apart the lengths are."""
    c = tiled()
    c.image.encoders[0].patch, c.image.encoders[0].image_size = 4, 24
    model = Model(c, tiny.arrays(c), tokenizer)
    wide, large = np.zeros((24, 48, 3), np.uint8), np.zeros((48, 48, 3), np.uint8)
    few, many = ask(wide, "What?"), ask(large, "What?")
    lengths = [len(prompts.lay_out(r, "here", model.prepare, ask=True).tokens) for r in (few, many)]
    assert prompts.bucket(lengths[0]) < prompts.bucket(lengths[1])
    alone = [model.generate([request], GREEDY)[0].tokens for request in (few, many)]
    assert [a.tokens for a in model.generate([few, many], GREEDY)] == alone


def test_two_encoders_see_their_own_views(tokenizer):
    c = two_encoders()
    model = Model(c, tiny.arrays(c), tokenizer)
    sample = prompts.lay_out(ask(pictures()[1]), "here", model.prepare)
    assert [view.shape for view in sample.media["image"]] == [(1, 24, 24, 3), (1, 16, 16, 3)]
    plain = model.logits([ask(pictures()[1])])[0]
    arrays = tiny.arrays(c)
    for path in arrays:
        if path.startswith("image/encoders/1/patch/"):
            arrays[path] = -arrays[path]
    assert np.abs(Model(c, arrays, tokenizer).logits([ask(pictures()[1])])[0] - plain).max() > 1e-3
    together = model.generate([ask(p) for p in pictures()], GREEDY)
    assert [a.tokens for a in together] == [model.generate(ask(p), GREEDY)[0].tokens for p in pictures()]
    assert len({tuple(a.tokens) for a in together}) > 1  # what is seen matters


def test_turns_marked_in_words(tokenizer):
    c = config(layout="text", user="User:", bot="AI:")
    model = Model(c, tiny.arrays(c), tokenizer)
    assert [p for p in nnx.parameters(model.module) if p.startswith("special")] == [
        "special/eoi",
        "special/soi",
    ]
    sample = prompts.lay_out(ask(pictures()[0]), "here", model.prepare, ask=True)
    text = [*tokenizer.encode(c.prompt)]
    assert sample.tokens[: len(text)].tolist() == text
    tail = tokenizer.encode("User:What is it?AI:")
    assert sample.tokens[-len(tail) :].tolist() == tail
    slots = slice(len(text), len(text) + 11)
    assert sample.kind[slots].tolist() == [SPECIAL, *[FEATURE] * 9, SPECIAL] and len(sample.tokens) == len(
        text
    ) + 11 + len(tail)
    assert [c.special[i] for i in sample.index[slots][[0, -1]]] == ["soi", "eoi"]


def test_training_batches_of_tiles_have_one_shape(tokenizer):
    c = tiled(newline=True, unpad=True)
    prepare = Prepare.of(tokenizer, c, 256)
    talk = (("user", "What is it?"), ("assistant", "A circle."))
    source = [tiny.dialogue(talk, picture) for picture in pictures()]
    usual = prepare.processors["image"].room
    batches = Batches(
        source, prepare, batch_size=2, length=256, tiles=prepare.tiles, usual=usual, shuffle=False
    )
    for _ in range(2):
        batch = next(batches)
        assert batch.media["image"][0].shape == (2, 5, 24, 24, 3) and (batch.weights.sum(axis=1) > 0).all()
    assert "<SOI> <30 image features and 3 ends of lines> <EOI> <USER>" in describe(
        source[1:], prepare, tokenizer
    )
