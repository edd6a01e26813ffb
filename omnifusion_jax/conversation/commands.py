"""What a line that begins with / does."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from omnifusion_jax.conversation.talk import Shown, Talk
from omnifusion_jax.conversation.typed import named, plain
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.fields import fields, nearest, read


class Command(NamedTuple):
    """A row of COMMANDS."""

    words: str  # what follows the command
    meaning: str
    do: Callable[[Talk, str], str]  # (talk, what follows) -> what the user is told


def image(talk, rest):
    if not rest:
        files = [str(shown.file) for shown in talk.past.pictures]
        return "\n".join(files) or "no picture is shown; /image FILE shows one"
    for shown in [Shown.of(name) for name in named(rest)]:  # all of them or, if one is wrong, none
        talk.show(shown)
    return ""


def undo(talk, rest):
    if not talk.undo():
        return "there is nothing to take back"
    questions, waiting = len(talk.past.turns), len(talk.past.waiting)
    return f"taken back; {count(questions, 'question')} before, {count(waiting, 'picture')} for the next one"


def reset(talk, rest):
    talk.reset()
    return "all is forgotten, pictures too"


def save(talk, rest):
    """Adds the talk to a file, so that none that was saved before is lost."""
    if not rest:
        raise DataError("/save needs the name of a file")
    if not talk.past.turns:
        raise DataError("nothing was said that could be saved")
    file = Path(plain(rest))
    line = json.dumps({"messages": talk.past.messages(lambda shown: str(shown.file))}, ensure_ascii=False)
    try:
        with open(file, "a", encoding="utf-8") as out:
            out.write(line + "\n")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}. Name another file") from None
    return f"{count(len(talk.past.turns), 'question')} and the answers: a line of {file}"


def setting(talk, rest):
    """Sets a field of the GenerationConfig, or lists them."""
    known, now = fields(talk.generation), vars(talk.generation)
    name, *value = re.split(r"[\s=]+", rest, maxsplit=1) if rest else ("",)
    if not name:
        return "\n".join(f"{name:24} {value!r:10} {known[name].meaning}" for name, value in now.items())
    if name not in known:
        meant = nearest(name, known)
        raise ConfigError(f"there is no {name}; {f'is {meant} meant? ' if meant else ''}/set lists all")
    if value:
        try:
            chosen = read(value[0], known[name].kind)
        except ValueError as error:
            raise ConfigError(f"{name} {value[0]}: {error}") from None
        talk.generation = dataclasses.replace(talk.generation, **{name: chosen})
    return f"{name} is {getattr(talk.generation, name)!r}"


def quit(talk, rest):
    raise EOFError


def help(talk, rest):
    return listed()


COMMANDS = {
    "/image": Command(
        "FILE ...", "shows pictures with the next question, as a file dragged into it does", image
    ),
    "/undo": Command("", "takes back the last question or picture", undo),
    "/reset": Command("", "starts again without pictures", reset),
    "/set": Command(
        "NAME VALUE", "changes how answers are drawn: /set temperature 0.7; /set lists all", setting
    ),
    "/save": Command("FILE", "adds what was said to a file, as a line of training data", save),
    "/help": Command("", "lists the commands", help),
    "/quit": Command("", "leaves, as does Ctrl-D; Ctrl-C stops an answer", quit),
}


def listed() -> str:
    """The commands, one a line."""
    return "\n".join(f"  {name:6} {row.words:11} {row.meaning}" for name, row in COMMANDS.items())


def obey(talk: Talk, line: str) -> str:
    """Does what a line that begins with / asks for, and returns what the user is told.

    Raises:
      EOFError: the conversation ends.
      OmniFusionError: it cannot be done.
    """
    name, _, rest = line.partition(" ")
    if name not in COMMANDS:
        raise DataError(f"there is no {name}, neither a command nor a picture. There are:\n{listed()}")
    return COMMANDS[name].do(talk, rest.strip())


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
