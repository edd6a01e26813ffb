"""File names as people type them, or drag them into a terminal: quoted, with backslashes, as URLs."""

import os
import re
import shlex
from urllib.parse import unquote, urlsplit

from PIL import Image

from omnifusion_jax.data.images import FORMATS

# A word of a line that looks like a path and stands apart, as a shell would read it: it begins with /, ~, ./,
# ../ or file:, and spaces in it are quoted or have a backslash before them.
PATH = re.compile(
    r"""(?<!\S)(?=['"]?(?:file:/|~|\.{0,2}/))(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"\\])+""", re.DOTALL
)
AFTER = "?!.,;:)"  # what may stand directly after a path in a sentence


def plain(name: str) -> str:
    """A file's name without the quotes and backslashes that a shell would take away, and from a file URL."""
    return " ".join(words(name))


def words(text: str) -> list[str]:
    """The names of files that stand in a text and nothing else."""
    try:
        return [local(word) for word in shlex.split(text)]
    except ValueError:  # an apostrophe that is no quote
        return [local(text)]


def local(name: str) -> str:
    """The path of a file URL, or of a name in which ~ is the user's home."""
    return os.path.expanduser(unquote(urlsplit(name).path) if name.startswith("file:") else name)


def named(text: str) -> list[str]:
    """The files that a text names; the whole text, spaces and all, if that is a file as it stands."""
    whole = local(text.strip())
    return [whole] if os.path.exists(whole) else words(text)


def dragged(line: str) -> tuple[list[str], str]:
    """(picture files whose paths stand in a line, the line without them).

    A path counts if there is such a file, and its name ends as those of pictures do.
    """
    known = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = []

    def taken(match):
        name, after = plain(match[0]), ""
        if not os.path.isfile(name):
            name, after = name.rstrip(AFTER), name[len(name.rstrip(AFTER)) :]
        if not (os.path.splitext(name)[1].lower() in known and os.path.isfile(name)):
            return match[0]
        found.append(name)
        return after

    rest = PATH.sub(taken, line)
    return found, " ".join(rest.split()) if found else line.strip()
