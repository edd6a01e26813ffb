"""Dialogues as people write them down: LLaVA JSON, or messages with roles."""

import dataclasses
from pathlib import Path
from typing import Any

from omnifusion_jax.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclasses.dataclass
class Request:
    """A question to a model: pictures (path, PIL image or uint8 array) and the dialogue so far, `[{"role": "user", "content": "What is it?"}]`."""

    messages: list
    images: list = dataclasses.field(default_factory=list)
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Dialogue:
    where: str  # file, line or number, and id: what an error names
    turns: tuple[tuple[str, str], ...]  # (role as written, text)
    images: tuple[Any, ...] = ()
    marked: bool = False  # the text must hold one <image> for each picture, as LLaVA writes it


def parse(record, where):
    """A record of either form to a Dialogue. Raises DataError naming `where`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a dialogue is an object with 'conversations' or 'messages', this is a {type(record).__name__}")
    if record.get("id") is not None:
        where = f'{where} (id "{record["id"]}")'
    images = next((record[key] for key in ("image", "images") if record.get(key) is not None), ())
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    for key, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
        if key in record:
            return Dialogue(where, turns(record[key], role, text, f"{where}: {key}"), images, marked=key == "conversations")
    raise DataError(f"{where}: there is neither 'conversations' (LLaVA) nor 'messages' in it, only {', '.join(map(str, record)) or 'nothing'}")


def turns(items, role, text, where):
    if not isinstance(items, list) or not items:
        raise DataError(f"{where} is not a list of turns, or is empty")
    for i, turn in enumerate(items):
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or not isinstance(turn.get(text), str):
            raise DataError(f"{where}[{i}] is not an object with the strings {role!r} and {text!r}")
        if has_half_characters(turn[text]):
            raise DataError(f"{where}[{i}] holds half a character (an unpaired surrogate, as of an emoji cut in two). Correct its text")
    return tuple((turn[role], turn[text]) for turn in items)


def has_half_characters(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def from_record(record, where, folder):
    """A record of a data file, whose pictures are names relative to `folder`, to a Dialogue. Raises DataError naming `where`."""
    dialogue = parse(record, where)
    for image in dialogue.images:
        if not isinstance(image, str):
            raise DataError(f'{dialogue.where}: "image" must name a file or a list of files, not hold a {type(image).__name__}')
    return dataclasses.replace(dialogue, images=tuple(Path(folder, image) for image in dialogue.images))


def from_request(request, where="request"):
    return parse({"id": request.id, "images": request.images, "messages": request.messages}, where)
