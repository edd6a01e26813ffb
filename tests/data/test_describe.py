"""The one example that a run prints before it starts."""

import dataclasses

import numpy as np
import pytest
import tiny

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.config import EncoderConfig, ImageConfig, ModelConfig
from omnifusion_jax.data.describe import describe, render
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(locate("omnifusion-tiny-decoder"))


def layout(tokenizer, style="omnifusion"):
    return tiny.layout(tokenizer, 96, layout=style)


TALK = Dialogue(
    "x",
    (
        ("user", "<image>\nWhere is the star?"),
        ("assistant", "top left"),
        ("user", "Где кольцо?"),
        ("assistant", "слева вверху"),
    ),
)
PICTURE = np.zeros((96, 96, 3), np.uint8)
SHOWN = dataclasses.replace(TALK, media=tiny.shown(PICTURE))
STREAMS = ("image",)
NAMES = ("user", "bot", "soi", "eoi")


def test_targets_are_marked_and_features_counted(tokenizer):
    assert render(layout(tokenizer)(SHOWN, [tiny.picture(PICTURE)]), tokenizer, NAMES, STREAMS) == (
        "This is a dialog with AI assistant.\n <SOI> <36 image features> <EOI>"
        " <USER> Where is the star? <BOT> [[top left</s>]]"
        " <USER> Где кольцо? <BOT> [[слева вверху</s>]]"
    )


def test_a_target_begins_where_text_that_is_none_ends(tokenizer):
    """In words a question and its answer are one run of text."""
    assert render(
        layout(tokenizer, "text")(SHOWN, [tiny.picture(PICTURE)]), tokenizer, ("soi", "eoi"), STREAMS
    ) == (
        "This is a dialog with AI assistant.\n <SOI> <36 image features> <EOI>"
        " User:Where is the star?AI: [[top left</s>]]"
        " User:Где кольцо?AI: [[слева вверху</s>]]"
    )


def test_ends_of_lines_are_no_features(tokenizer):
    image = ImageConfig((EncoderConfig(image_size=32, patch=16),), fit="tiles", newline=True)
    prepare = Prepare.of(tokenizer, ModelConfig(image=image), 96)
    wide = np.zeros((32, 64, 3), np.uint8)  # the whole, and two tiles: three squares of 2 x 2 patches
    sample = prepare(dataclasses.replace(TALK, media=tiny.shown(wide)))
    text = render(sample, tokenizer, prepare.layout.vectors, STREAMS)
    assert " <SOI> <12 image features and 2 ends of lines> <EOI>" in text


def test_the_original_layout_has_no_end_of_sequence(tokenizer):
    text = render(layout(tokenizer, "original")(TALK, []), tokenizer, NAMES, STREAMS)
    assert (
        text.endswith("<USER> Где кольцо? <BOT> [[слева вверху]]")
        and "</s>" not in text
        and "<SOI>" not in text
    )


def test_targets_that_cost_nothing_are_text_all_the_same(tmp_path):
    """The layout "original" knows targets that the tokenizer does not."""
    tokenizer = tiny.make_tokenizer(tmp_path)
    sample = tiny.layout(tokenizer, 96, layout="original")(
        Dialogue("x", (("user", "What?"), ("assistant", "a <unk> star"))), []
    )
    said = tokenizer.decode(tokenizer.encode("a <unk> star"))
    assert render(sample, tokenizer, NAMES, STREAMS).endswith(f"<USER> What? <BOT> [[{said}]]")


def test_the_first_sample_that_can_be_used_is_shown(tokenizer):
    good = dataclasses.replace(SHOWN, where="good")
    source = [Dialogue("bad", (("user", "Why?"),)), good]
    assert describe(source, tiny.prepare(tokenizer, 96), tokenizer).startswith(
        "This is a dialog with AI assistant.\n <SOI>"
    )


def test_when_none_can_be_used_it_says_why_soon(tokenizer):
    class Bad:
        read = 0

        def __len__(self):
            return 2**30

        def __getitem__(self, i):
            self.read += 1
            raise DataError(f"d.json[{i}]: broken")

    source = Bad()
    text = describe(source, tiny.prepare(tokenizer, 96), tokenizer)
    assert (
        text.startswith("None of the first samples can be used") and "d.json[" in text and source.read == 100
    )
