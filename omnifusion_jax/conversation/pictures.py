"""Pictures in a terminal, for those that say in their environment that they draw them.

The protocols: https://sw.kovidgoyal.net/kitty/graphics-protocol, https://iterm2.com/documentation-images.html
"""

import base64
import io
import re
from collections.abc import Mapping

from PIL import Image

LARGEST = (480, 320)  # pixels; a larger picture is drawn smaller
PIECE = 4096  # characters that kitty takes at once


def kitty(data: bytes) -> str:
    """The sequence that has a kitty draw a PNG file at the cursor, and answer nothing (q=2)."""
    text = base64.b64encode(data).decode()
    pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
    last = len(pieces) - 1
    first = lambda i: "a=T,f=100,q=2," if i == 0 else ""
    return "".join(f"\033_G{first(i)}m={int(i < last)};{piece}\033\\" for i, piece in enumerate(pieces))


def iterm(data: bytes) -> str:
    """The sequence that has an iTerm2 draw a file at the cursor."""
    text = base64.b64encode(data).decode()
    return f"\033]1337;File=inline=1;size={len(data)};preserveAspectRatio=1:{text}\a"


# (variable of the environment, pattern of its value, protocol); the first row that fits counts
TERMINALS = (
    ("TMUX", r".+", None),  # which lets no picture through
    ("TERM", r"(screen|tmux|dumb).*", None),
    ("TERM", r"xterm-(kitty|ghostty)", kitty),
    ("KITTY_WINDOW_ID", r".+", kitty),
    ("TERM_PROGRAM", r"ghostty", kitty),
    ("TERM_PROGRAM", r"iTerm\.app|WezTerm|mintty", iterm),
    ("LC_TERMINAL", r"iTerm2", iterm),
)


def drawn(image: Image.Image, environment: Mapping[str, str]) -> str:
    """What has the terminal draw a picture, with a newline after it; "" if it cannot."""
    fits = (protocol for name, value, protocol in TERMINALS if re.fullmatch(value, environment.get(name, "")))
    protocol = next(fits, None)
    if protocol is None:
        return ""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail(LARGEST)
    small.save(file, "PNG")
    return protocol(file.getvalue()) + "\n"
