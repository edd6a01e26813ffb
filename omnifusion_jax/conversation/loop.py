"""Lines become questions or commands, and answers are printed as they come."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable

from PIL import Image

from omnifusion_jax.conversation.commands import COMMANDS, count, obey
from omnifusion_jax.conversation.talk import Past, Shown, Talk
from omnifusion_jax.conversation.typed import dragged
from omnifusion_jax.errors import OmniFusionError


def converse(
    talk: Talk, lines: Iterable[str], *, draw: Callable[[Image.Image], str] = lambda image: "", verbose=False
) -> int:
    """Answers lines until they end or one is /quit. Returns how many of them were in vain.

    Answers go to stdout, and all else to stderr, so that in a pipe answers are alone. A question that cannot
    be answered is taken back. A command never goes to the model.

    Args:
      draw: makes of a picture what has the terminal draw it.
      verbose: says how long each answer took.
    """
    vain = 0
    announce(talk.past.pictures, 0, draw)
    for line in lines:
        try:
            hear(talk, line.strip(), draw, verbose)
        except EOFError:
            break
        except OmniFusionError as error:
            tell(f"error: {error}")
            vain += 1
    return vain


def hear(talk, line, draw, verbose):
    """Does what one line asks for."""
    pictures = len(talk.past.pictures)
    if line.partition(" ")[0] in COMMANDS:
        said, question = obey(talk, line), ""
    else:
        files, question = dragged(line)
        for shown in [Shown.of(file) for file in files]:
            talk.show(shown)
        said = obey(talk, question) if question.startswith("/") else ""
    announce(talk.past.pictures, pictures, draw)
    if said:
        tell(said)
    elif question:
        answer(talk, question, verbose)


def announce(pictures, known, draw):
    """Shows the user the pictures that came after those that are known."""
    for number, shown in enumerate(pictures[known:], known + 1):
        width, height = shown.image.size
        tell(f"{draw(shown.image)}[picture {number}: {shown.file}, {width} x {height}]")


def answer(talk, question, verbose):
    """Prints an answer as it comes, and remembers it; Ctrl-C stops it."""
    begun, first, said, before = time.perf_counter(), None, "", talk.past
    try:
        with contextlib.closing(talk.ask(question)) as pieces:
            if gone := left_out(before, talk.past):
                tell(gone)
            for piece in pieces:
                first = first or time.perf_counter() - begun
                print(piece, end="", flush=True)
                said += piece
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print(flush=True)
    if said.strip():  # else it leaves no trace
        talk.keep(question, said)
    if verbose and first is not None:
        tell(f"[first words after {first:.2f} s, all after {time.perf_counter() - begun:.2f} s]")


def left_out(before: Past, after: Past) -> str:
    """What the model is no longer reminded of, in words."""
    turns, pictures = len(before.turns) - len(after.turns), len(before.pictures) - len(after.pictures)
    gone = [count(turns, "question")] * bool(turns) + [count(pictures, "picture")] * bool(pictures)
    return f"[the model's context is full: the oldest {' and '.join(gone)} left out]" if gone else ""


def tell(text):
    print(text, file=sys.stderr, flush=True)
