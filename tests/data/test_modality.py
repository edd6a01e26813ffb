"""Marks in texts: found, cut out, and counted, by hand."""

import pytest

from omnifusion_jax.data.chat_template import in_one_string
from omnifusion_jax.data.modality import (
    content_parts,
    first_given,
    marked,
    pieces,
    without_breaks,
    without_marks,
)

SHOWN = {"type": "image"}


def said(text):
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("text", "between", "parts", "bare", "joined", "in_words"),
    [
        ("What?", ["What?"], [said("What?")], "What?", "What?", "What?"),
        (
            "<image>\nWhat?",
            ["", "<image>", "\nWhat?"],
            [SHOWN, said("\nWhat?")],
            "What?",
            "<image>What?",
            "<pic>\n\nWhat?",
        ),
        (
            " What? <image> ",
            [" What? ", "<image>", " "],
            [said(" What? "), SHOWN, said(" ")],
            "What?",
            "What? <image>",
            " What? <pic> ",
        ),
        (
            "<image><image>a\n<image>",
            ["", "<image>", "", "<image>", "a\n", "<image>", ""],
            [SHOWN, SHOWN, said("a\n"), SHOWN],
            "a",
            "<image><image>a<image>",
            "<pic>\n<pic>\na\n<pic>",
        ),
        ("<image>", ["", "<image>", ""], [SHOWN], "", "<image>", "<pic>\n"),
    ],
)
def test_a_text_and_its_marks(text, between, parts, bare, joined, in_words):
    """The last is what a template of a language model gets: media before all text have lines of their own."""
    assert pieces(text) == between and marked(text) == between[1::2]
    assert content_parts(text) == parts
    assert (without_marks(text), without_breaks(text)) == (bare, joined)
    assert in_one_string(text, {"<image>": "<pic>"}, ()) == in_words


def test_text_without_marks_keeps_its_white_space():
    assert without_marks(" a \n") == without_breaks(" a \n") == " a \n"


def test_the_first_that_is_given():
    keys = ("image", "images")
    assert first_given({"image": None, "images": [1]}, keys, ()) == [1]
    assert first_given({"image": "", "images": [1]}, keys, ()) == ""
    assert first_given({"images": [1], "image": 2}, keys, ()) == 2
    assert first_given({"image": None}, keys, "none") == "none"
