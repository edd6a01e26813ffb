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


def painted(data, wide, high):
    """What sixels leave on a screen, in percent of each colour [high, wide, 3]; -1 where nothing is."""
    screen, colours, colour, at, top = np.full((high, wide, 3), -1), {}, None, 0, 0
    for word in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+[?-~]|[?-~]|[$-]", data):
        if word[0] == "#":
            colour, *values = (int(n) for n in re.split("[#;]", word)[1:])
            colours |= {colour: values[1:]} if values else {}
        elif word in "$-":
            at, top = 0, top + 6 * (word == "-")
        else:
            count, mark = int(word[1:-1] or 1) if word[0] == "!" else 1, ord(word[-1]) - 63
            for i in range(6):
                if mark >> i & 1:
                    assert (screen[top + i, at : at + count] == -1).all() and at + count <= wide
                    screen[top + i, at : at + count] = colours[colour]
            at += count
    return screen


def test_a_foot_gets_sixels():
    colours = np.random.default_rng(1).integers(0, 256, (40, 3), np.uint8)
    pixels = colours[np.random.default_rng(2).integers(0, 40, (20, 51))]
    pixels[:8, :30] = colours[3]  # a run
    text = drawn(Image.fromarray(pixels), {"TERM": "foot-extra"})
    assert text == drawn(Image.fromarray(pixels), {"TERM": "xterm-256color", "KONSOLE_VERSION": "220402"})
    data = re.fullmatch(r'\033Pq"1;1;51;20([^\033]*)\033\\\n', text)[1]
    assert len(data) < len(re.sub(r"!(\d+)(.)", lambda run: run[2] * int(run[1]), data))
    np.testing.assert_allclose(painted(data, 51, 20), pixels / 2.55, atol=0.6)


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
        {"TERM": "xterm-256color", "KONSOLE_VERSION": "211203"},
    ],
)
def test_other_terminals_get_nothing(environment):
    assert drawn(Image.fromarray(PIXELS), environment) == ""
