"""Dialogues as people write them down: LLaVA JSON, or messages with roles."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from omnifusion_jax.data.images import is_data_url, is_url
from omnifusion_jax.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORMS = (
    ("conversations", "from", "value"),
    ("messages", "role", "content"),
)  # LLaVA's and OpenAI's: key, speaker, what is said
NEXT = object()  # the next of the pictures that stand beside the messages
IMAGE = "image"  # the stream of pictures
MARKS = {"image": "<image>"}  # what stands for an item of a stream in a text


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


class Media(NamedTuple):
    """An item of a stream: a file, a data URL, a PIL image or an array."""

    stream: str
    source: Any


@dataclasses.dataclass(frozen=True)
class Dialogue:
    where: str  # file, line or number, and id: what an error names
    turns: tuple[tuple[str, str], ...]  # (role as written, text, with marks where media stand in it)
    media: tuple[Media, ...] = ()  # of any stream, in order
    marked: bool = False  # LLaVA's form: the text must hold one mark for each item
    parted: bool = False  # the marks were put where a list of parts has media

    @property
    def images(self):
        """The pictures among its media."""
        return tuple(media.source for media in self.media if media.stream == IMAGE)


def parse(record, where):
    """A record of either form to a Dialogue. Raises DataError naming `where`."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a dialogue is an object with 'conversations' or 'messages', this is a {type(record).__name__}"
        )
    if record.get("id") is not None:
        where = f'{where} (id "{record["id"]}")'
    images = next((record[key] for key in ("image", "images") if record.get(key) is not None), ())
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    for key, role, text in FORMS:
        if key in record:
            marked, found = key == "conversations", turns(record[key], role, text, f"{where}: {key}")
            if not marked:
                return Dialogue(where, *assembled(found, images, where))
            return Dialogue(where, found, tuple(Media(IMAGE, image) for image in images), marked)
    raise DataError(
        f"{where}: there is neither 'conversations' (LLaVA) nor 'messages' in it, only {', '.join(map(str, record)) or 'nothing'}"
    )


def turns(items, role, text, where):
    """((role, text or parts), ...) of the turns as they are written."""
    if not isinstance(items, list) or not items:
        raise DataError(f"{where} is not a list of turns, or is empty")
    kinds, parts = ((str, list), ", or a list of parts") if text == "content" else (str, "")
    for i, turn in enumerate(items):
        if (
            not isinstance(turn, dict)
            or not isinstance(turn.get(role), str)
            or not isinstance(turn.get(text), kinds)
        ):
            raise DataError(f"{where}[{i}] is not an object with the strings {role!r} and {text!r}{parts}")
        if isinstance(turn[text], str):
            check_characters(turn[text], f"{where}[{i}]")
    return tuple((turn[role], turn[text]) for turn in items)


def assembled(turns, images, where):
    """What a Dialogue has after `where`, of turns whose content may be a list of parts.

    Parts are joined by newlines, and those that are media are marks. An "image_url" brings its picture, an "image"
    without one stands for the next of `images`.
    """
    spoken, said, shown = [], [], []  # turns of text alone; what they say without marks of parts; all media
    for i, (role, content) in enumerate(turns):
        at = f"{where}: messages[{i}].content"
        parts = (
            [content]
            if isinstance(content, str)
            else [read_part(part, f"{at}[{j}]") for j, part in enumerate(content)]
        )
        spoken.append(
            (role, "\n".join(part if isinstance(part, str) else MARKS[part.stream] for part in parts))
        )
        said += [part for part in parts if isinstance(part, str)]
        shown += [part for part in parts if isinstance(part, Media)]
    if not shown:
        return tuple(spoken), tuple(Media(IMAGE, image) for image in images)
    if any(mark in text for text in said for mark in MARKS.values()):
        marks = ", ".join(MARKS.values())
        raise DataError(
            f"{where}: media stand as parts, and the text has marks of its own ({marks}). Remove the marks"
        )
    if (wanted := sum(media.source is NEXT for media in shown)) != len(images):
        raise DataError(
            f'{where}: {wanted} "image" parts name no picture, and "images" lists {len(images)}. Each takes one of them, in order'
        )
    rest = iter(images)
    media = tuple(Media(media.stream, next(rest)) if media.source is NEXT else media for media in shown)
    return tuple(spoken), media, False, True


def read_part(part, where):
    """A part of a turn's content: its text, or its Media."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PARTS:
        raise DataError(
            f"{where} is of type {kind!r}; known are {', '.join(PARTS)}. Leave it out or say it in text"
        )
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
    return Media(IMAGE, found)


def image_part(part, where):
    return Media(
        IMAGE, next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), NEXT)
    )


PARTS = {"text": text_part, "image_url": image_url_part, "image": image_part}


def check_characters(text, where):
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half a character (an unpaired surrogate, as of an emoji cut in two). Correct its text"
        ) from None


def from_record(record, where, folder):
    """A record of a data file, whose pictures are names relative to `folder`, or data URLs, to a Dialogue.

    Raises DataError naming `where`.
    """
    dialogue = parse(record, where)
    for stream, source in dialogue.media:
        if not isinstance(source, str):
            raise DataError(
                f'{dialogue.where}: "{stream}" must name a file or a list of files, not hold a {type(source).__name__}'
            )
    addressed = tuple(
        m if is_url(m.source) or is_data_url(m.source) else m._replace(source=Path(folder, m.source))
        for m in dialogue.media
    )
    return dataclasses.replace(dialogue, media=addressed)


def from_request(request, where="request"):
    return parse({"id": request.id, "images": request.images, "messages": request.messages}, where)
