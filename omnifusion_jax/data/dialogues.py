"""Dialogues as people write them down: LLaVA JSON, or messages with roles."""

import dataclasses
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
    images = record.get("image", record.get("images"))
    images = () if images is None else (images,) if isinstance(images, str) or not isinstance(images, (list, tuple)) else tuple(images)
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
    return tuple((turn[role], turn[text]) for turn in items)


def from_request(request, where="request"):
    return parse({"id": request.id, "images": request.images, "messages": request.messages}, where)
