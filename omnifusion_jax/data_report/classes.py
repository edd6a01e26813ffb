"""What answers and pictures are counted by: the script of a text, the size of a picture."""

import bisect
import re

SCRIPTS = {
    "Latin": re.compile("[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]"),
    "Cyrillic": re.compile("[\u0400-\u052f\u1c80-\u1c8a\u2de0-\u2dff\ua640-\ua69f]"),
    # Chinese characters, kana and Hangul
    "CJK": re.compile(
        "[\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
        "\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]"
    ),
}
OTHER = "other"  # any other script, or no letters at all


def script(text: str) -> str:
    """The script of most letters of a text: a name in SCRIPTS, or OTHER."""
    counts = {name: len(letters.findall(text)) for name, letters in SCRIPTS.items()}
    counts[OTHER] = sum(map(str.isalpha, text)) - sum(counts.values())
    most = max(counts, key=counts.get)
    return most if counts[most] > 0 else OTHER


SIDES = (128, 256, 512, 1024, 2048, 4096)  # pixels: the largest side of each class but the last


def size_class(width: int, height: int) -> str:
    """The class of a picture, such as "513-1024 x 257-512"; "over 4096" for the largest sides."""
    return f"{side_class(width)} x {side_class(height)}"


def side_class(pixels: int) -> str:
    number = bisect.bisect_left(SIDES, pixels)
    if number == len(SIDES):
        return f"over {SIDES[-1]}"
    return f"{SIDES[number - 1] + 1 if number else 1}-{SIDES[number]}"
