"""Dialogues as people write them down: LLaVA JSON, or messages with roles."""

import dataclasses
from pathlib import Path
from typing import Any

from omnifusion_jax.data.images import is_data_url, is_url
from omnifusion_jax.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORMS = (("conversations", "from", "value"), ("messages", "role", "content"))  # LLaVA's and OpenAI's: key, speaker, what is said
NEXT = object()  # the next of the pictures that stand beside the messages


@dataclasses.dataclass
class Request:
    """A question to a model: pictures (path, data URL, PIL image or uint8 array) and the dialogue so far.

    `messages` are `[{"role": "user", "content": "What is it?"}]`; `content` may be a list of parts, as OpenAI
    has it. `id` is what errors name it by, and what its random numbers follow from; without one its place in
    the list is.
    """

    messages: list
    images: list = dataclasses.field(default_factory=list)
    id: str | None = None


@dataclasses.dataclass(frozen=True)
class Dialogue:
    where: str  # file, line or number, and id: what an error names
    turns: tuple[tuple[str, str], ...]  # (role as written, text)
    images: tuple[Any, ...] = ()
    marked: bool = False  # LLaVA's form: the text must hold one <image> for each picture
    places: tuple[int, ...] = ()  # how many pictures each turn shows, where its parts say so


def parse(record, where):
    """A record of either form to a Dialogue. Raises DataError naming `where`."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a dialogue is an object with 'conversations' or 'messages', this is a {type(record).__name__}")
    if record.get("id") is not None:
        where = f'{where} (id "{record["id"]}")'
    images = next((record[key] for key in ("image", "images") if record.get(key) is not None), ())
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    for key, role, text in FORMS:
        if key in record:
            marked, found = key == "conversations", turns(record[key], role, text, f"{where}: {key}")
            return Dialogue(where, found, images, marked) if marked else Dialogue(where, *assembled(found, images, where))
    raise DataError(f"{where}: there is neither 'conversations' (LLaVA) nor 'messages' in it, only {', '.join(map(str, record)) or 'nothing'}")


def turns(items, role, text, where):
    """((role, text or parts), ...) of the turns as they are written."""
    if not isinstance(items, list) or not items:
        raise DataError(f"{where} is not a list of turns, or is empty")
    kinds, parts = ((str, list), ", or a list of parts") if text == "content" else (str, "")
    for i, turn in enumerate(items):
        if not isinstance(turn, dict) or not isinstance(turn.get(role), str) or not isinstance(turn.get(text), kinds):
            raise DataError(f"{where}[{i}] is not an object with the strings {role!r} and {text!r}{parts}")
        if isinstance(turn[text], str):
            check_characters(turn[text], f"{where}[{i}]")
    return tuple((turn[role], turn[text]) for turn in items)


def assembled(turns, images, where):
    """What a Dialogue has after `where`, of turns whose content may be a list of parts.

    Text parts are joined by newlines. An "image_url" brings its picture, an "image" without one stands for
    the next of `images`.
    """
    spoken, shown, places = [], [], []  # turns of text alone, all pictures in order, how many each turn shows
    for i, (role, content) in enumerate(turns):
        parts = [content] if isinstance(content, str) else [read_part(p, f"{where}: messages[{i}].content[{j}]") for j, p in enumerate(content)]
        texts = [part for part in parts if isinstance(part, str)]
        spoken.append((role, "\n".join(texts)))
        places.append(len(parts) - len(texts))
        shown += [part[0] for part in parts if not isinstance(part, str)]
    if not shown:
        return tuple(spoken), images, False, ()
    if (wanted := sum(source is NEXT for source in shown)) != len(images):
        raise DataError(f'{where}: {wanted} "image" parts name no picture, and "images" lists {len(images)}. Each takes one of them, in order')
    rest = iter(images)
    return tuple(spoken), tuple(next(rest) if source is NEXT else source for source in shown), False, tuple(places)


def read_part(part, where):
    """A part of a turn's content: its text, or its picture in a tuple."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PARTS:
        raise DataError(f"{where} is of type {kind!r}; known are {', '.join(PARTS)}. Leave it out or say it in text")
    return PARTS[kind](part, where)


def text_part(part, where):
    if not isinstance(part.get("text"), str):
        raise DataError(f"{where} has no string 'text'")
    check_characters(part["text"], where)
    return part["text"]


def image_url_part(part, where):
    found = part.get("image_url")
    found = found.get("url") if isinstance(found, dict) else found
    if not isinstance(found, str):
        raise DataError(f"{where} has no string 'url' in its 'image_url': a file's name, or a data URL")
    return (found,)


def image_part(part, where):
    return (next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), NEXT),)


PARTS = {"text": text_part, "image_url": image_url_part, "image": image_part}


def check_characters(text, where):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half a character (an unpaired surrogate, as of an emoji cut in two). Correct its text") from None


def from_record(record, where, folder):
    """A record of a data file, whose pictures are names relative to `folder`, or data URLs, to a Dialogue.

    Raises DataError naming `where`.
    """
    dialogue = parse(record, where)
    for image in dialogue.images:
        if not isinstance(image, str):
            raise DataError(f'{dialogue.where}: "image" must name a file or a list of files, not hold a {type(image).__name__}')
    addressed = [image if is_url(image) or is_data_url(image) else Path(folder, image) for image in dialogue.images]
    return dataclasses.replace(dialogue, images=tuple(addressed))


def from_request(request, where="request"):
    return parse({"id": request.id, "images": request.images, "messages": request.messages}, where)
