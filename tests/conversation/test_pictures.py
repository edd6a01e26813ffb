"""What has terminals draw a picture, read back as their protocols define it."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from omnifusion_jax.conversation.pictures import drawn

PIXELS = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)


def opened(text):
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def test_a_kitty_gets_pieces_of_a_png():
    text = drawn(Image.fromarray(PIXELS), {"TERM": "xterm-kitty"})
    pieces = re.findall(r"\033_G([^;]*);([^\033]*)\033\\", text)
    assert "".join(f"\033_G{keys};{data}\033\\" for keys, data in pieces) + "\n" == text
    assert all(len(data) <= 4096 for _, data in pieces) and all(len(data) % 4 == 0 for _, data in pieces)
    keys = [dict(key.split("=") for key in keys.split(",")) for keys, _ in pieces]
    assert len(keys) > 2 and [key["m"] for key in keys] == ["1"] * (len(keys) - 1) + ["0"]
    assert keys[0] == {"a": "T", "f": "100", "q": "2", "m": "1"} and set(keys[1]) == {"m"}
    np.testing.assert_array_equal(opened("".join(data for _, data in pieces)), PIXELS)


def test_an_iterm_gets_a_file():
    text = drawn(Image.fromarray(PIXELS), {"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"})
    head, data = re.fullmatch(r"\033\]1337;File=([^:]*):([^\a]*)\a\n", text).groups()
    assert dict(one.split("=") for one in head.split(";"))["size"] == str(len(base64.b64decode(data)))
    np.testing.assert_array_equal(opened(data), PIXELS)


def test_a_large_picture_is_drawn_smaller():
    image = Image.new("RGB", (4000, 3000))
    text = drawn(image, {"LC_TERMINAL": "iTerm2"})
    assert opened(text[text.index(":") + 1 : -2]).size == (427, 320) and image.size == (4000, 3000)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TERM": "xterm-256color"},
        {"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"},
        {"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-1/default,1,0"},
        {"TERM_PROGRAM": "Apple_Terminal"},
    ],
)
def test_other_terminals_get_nothing(environment):
    assert drawn(Image.fromarray(PIXELS), environment) == ""
