"""Pictures in a terminal, for those that say in their environment that they draw them.

The protocols: https://sw.kovidgoyal.net/kitty/graphics-protocol, https://iterm2.com/documentation-images.html,
and of sixels https://vt100.net/docs/vt3xx-gp/chapter14.html
"""

import base64
import io
import re
from collections.abc import Mapping

import numpy as np
from PIL import Image

LARGEST = (480, 320)  # pixels; a larger picture is drawn smaller
PIECE = 4096  # characters that kitty takes at once
BAND = 6  # rows that sixels draw at once: a bit for each of them, in a character


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def kitty(image: Image.Image) -> str:
    """The sequence that has a kitty draw a picture at the cursor, and answer nothing (q=2)."""
    text = base64.b64encode(png(image)).decode()
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    last = len(pieces) - 1
    first = lambda i: "a=T,f=100,q=2," if i == 0 else ""
    return "".join(f"\033_G{first(i)}m={int(i < last)};{piece}\033\\" for i, piece in enumerate(pieces))


def iterm(image: Image.Image) -> str:
    """The sequence that has an iTerm2 draw a picture at the cursor."""
    data = png(image)
    text = base64.b64encode(data).decode()
    return f"\033]1337;File=inline=1;size={len(data)};preserveAspectRatio=1:{text}\a"


def sixel(image: Image.Image) -> str:
    """The sequence that has a terminal with sixels draw a picture at the cursor, in 256 colours at most."""
    reduced = image.convert("RGB").quantize(256)
    colours = (np.array(reduced.getpalette()).reshape(-1, 3) * 100 + 127) // 255  # in percent
    named = "".join(f"#{i};2;{r};{g};{b}" for i, (r, g, b) in enumerate(colours))
    pixels = np.asarray(reduced)
    bands = "-".join(band(pixels[top : top + BAND]) for top in range(0, len(pixels), BAND))
    return f'\033Pq"1;1;{image.width};{image.height}{named}{bands}\033\\'


def band(rows: np.ndarray) -> str:
    """Rows of colour numbers uint8[rows, width], at most BAND: one line over the other for each colour."""
    bits = 1 << np.arange(len(rows))
    lines = {colour: (63 + bits @ (rows == colour)).astype(np.uint8) for colour in np.unique(rows)}
    short = lambda line: re.sub(r"(.)\1{3,}", lambda same: f"!{len(same[0])}{same[1]}", line)
    return "$".join(f"#{colour}{short(line.tobytes().decode())}" for colour, line in lines.items())


# (variable of the environment, pattern of its value, protocol); the first row that fits counts
TERMINALS = (
    ("TMUX", r".+", None),  # which lets no picture through
    ("TERM", r"(screen|tmux|dumb).*", None),
    ("TERM", r"xterm-(kitty|ghostty)", kitty),
    ("KITTY_WINDOW_ID", r".+", kitty),
    ("TERM_PROGRAM", r"ghostty", kitty),
    ("TERM_PROGRAM", r"iTerm\.app|WezTerm|mintty", iterm),
    ("LC_TERMINAL", r"iTerm2", iterm),
    ("TERM", r"(foot|mlterm|contour)(-.*)?", sixel),
    ("KONSOLE_VERSION", r"(2[2-9]|[3-9]\d)\d{4}", sixel),  # since 22.04
)


def drawn(image: Image.Image, environment: Mapping[str, str]) -> str:
    """What has the terminal draw a picture, with a newline after it; "" if it cannot."""
    fits = (protocol for name, value, protocol in TERMINALS if re.fullmatch(value, environment.get(name, "")))
    protocol = next(fits, None)
    if protocol is None:
        return ""
    small = image.copy()
    small.thumbnail(LARGEST)
    return protocol(small) + "\n"
