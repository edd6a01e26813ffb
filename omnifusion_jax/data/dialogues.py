"""Reads dialogues in the forms in which people write them: LLaVA JSON, or messages with roles."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from omnifusion_jax.data.images import is_data_url, is_url
from omnifusion_jax.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# LLaVA's form and OpenAI's: the key of the list of turns, and the keys of a turn's speaker and content
FORMS = (("conversations", "from", "value"), ("messages", "role", "content"))
NEXT = object()  # source of a Media that is the next of the pictures listed beside the messages
IMAGE = "image"  # the stream of pictures
MARKS = {"image": "<image>"}  # the mark in a text for a media item, by stream


@dataclasses.dataclass
class Request:
    """A question to a model: pictures (path, data URL, PIL image or uint8 array) and the dialogue so far.

    `messages` are `[{"role": "user", "content": "What is it?"}]`; `content` may be a list of parts, as in
    OpenAI's form. Errors name the request by its `id`, which also seeds its random numbers; without an `id`,
    its place in the list does both.
    """

    messages: list
    images: list = dataclasses.field(default_factory=list)
    id: str | None = None


class Media(NamedTuple):
    """A media item of a stream."""

    stream: str
    source: Any  # a file, a data URL, a PIL image or an array


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A dialogue and its media, read but not yet checked."""

    where: str  # names the dialogue in errors: its file, line or number, and id
    turns: tuple[tuple[str, str], ...]  # (role as written, text with marks where media items stand in it)
    media: tuple[Media, ...] = ()  # of all streams, in order
    marked: bool = False  # LLaVA's form: the text must hold one mark for each item
    parted: bool = False  # the content was a list of parts, and marks stand where media items were among them

    @property
    def images(self) -> tuple:
        """The sources of its pictures."""
        return tuple(media.source for media in self.media if media.stream == IMAGE)


def parse(record: Any, where: str) -> Dialogue:
    """The Dialogue of a record of either form. Raises DataError, which names `where`."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a dialogue is an object with 'conversations' or 'messages', "
            f"this is a {type(record).__name__}"
        )
    if record.get("id") is not None:
        where = f'{where} (id "{record["id"]}")'
    images = first_given(record, ("image", "images"), ())
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    for key, role, text in FORMS:
        if key in record:
            found = turns(record[key], role, text, f"{where}: {key}")
            if key == "conversations":
                return Dialogue(where, found, tuple(Media(IMAGE, image) for image in images), marked=True)
            return Dialogue(where, *assembled(found, images, where))
    keys = ", ".join(map(str, record)) or "nothing"
    raise DataError(f"{where}: there is neither 'conversations' (LLaVA) nor 'messages' in it, only {keys}")


def first_given(record, keys, default):
    """The value of the first of `keys` whose value in `record` is not None, or else `default`."""
    return next((record[key] for key in keys if record.get(key) is not None), default)


def turns(items, role, text, where):
    """((role, text or list of parts), ...): the turns as written, under their keys `role` and `text`."""
    if not isinstance(items, list) or not items:
        raise DataError(f"{where} is not a list of turns, or is empty")
    kinds, parts = str, ""
    if text == "content":  # only OpenAI's form has lists of parts
        kinds, parts = (str, list), ", or a list of parts"
    for i, turn in enumerate(items):
        right = (
            isinstance(turn, dict) and isinstance(turn.get(role), str) and isinstance(turn.get(text), kinds)
        )
        if not right:
            raise DataError(f"{where}[{i}] is not an object with the strings {role!r} and {text!r}{parts}")
        if isinstance(turn[text], str):
            check_characters(turn[text], f"{where}[{i}]")
    return tuple((turn[role], turn[text]) for turn in items)


def assembled(turns, images, where):
    """The fields of a Dialogue after `where`, from turns whose content may be a list of parts.

    Parts are joined by newlines, and each media item becomes a mark. A part "image_url" brings its own
    picture; a part "image" that names none takes the next of `images`.
    """
    spoken = []  # (role, text with marks)
    said = []  # all text parts
    shown = []  # all media parts
    for i, (role, content) in enumerate(turns):
        at = f"{where}: messages[{i}].content"
        if isinstance(content, str):
            parts = [content]
        else:
            parts = [read_part(part, f"{at}[{j}]") for j, part in enumerate(content)]
        written = [part if isinstance(part, str) else MARKS[part.stream] for part in parts]
        spoken.append((role, "\n".join(written)))
        said += [part for part in parts if isinstance(part, str)]
        shown += [part for part in parts if isinstance(part, Media)]
    if not shown:
        return tuple(spoken), tuple(Media(IMAGE, image) for image in images)
    if any(mark in text for text in said for mark in MARKS.values()):
        marks = ", ".join(MARKS.values())
        raise DataError(
            f"{where}: media stand as parts, and the text has marks of its own ({marks}). Remove the marks"
        )
    wanted = sum(media.source is NEXT for media in shown)
    if wanted != len(images):
        raise DataError(
            f'{where}: {wanted} "image" parts name no picture, and "images" lists {len(images)}. '
            "Each takes one of them, in order"
        )
    rest = iter(images)
    media = tuple(Media(media.stream, next(rest)) if media.source is NEXT else media for media in shown)
    return tuple(spoken), media, False, True


def read_part(part, where):
    """The text or the Media of one part of a turn's content. Raises DataError, which names `where`."""
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
    return Media(IMAGE, first_given(part, ("image", "path", "url"), NEXT))


PARTS = {"text": text_part, "image_url": image_url_part, "image": image_part}


def check_characters(text, where):
    """Raises DataError for text that UTF-8 cannot encode, as a tokenizer must."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half a character (an unpaired surrogate, as of an emoji cut in two). "
            "Correct its text"
        ) from None


def from_record(record: Any, where: str, folder: str | Path) -> Dialogue:
    """The Dialogue of a record of a data file, where media are data URLs or file names relative to `folder`.

    Raises:
      DataError: the record has neither form, or media of another type; the message names `where`.
    """
    dialogue = parse(record, where)
    for stream, source in dialogue.media:
        if not isinstance(source, str):
            raise DataError(
                f'{dialogue.where}: "{stream}" must name a file or a list of files, '
                f"not hold a {type(source).__name__}"
            )
    located = []
    for item in dialogue.media:
        whole = is_url(item.source) or is_data_url(item.source)  # not relative to a folder
        located.append(item if whole else item._replace(source=Path(folder, item.source)))
    return dataclasses.replace(dialogue, media=tuple(located))


def from_request(request: Request, where: str = "request") -> Dialogue:
    """The Dialogue of a Request. Raises DataError, which names `where` and its `id`."""
    return parse({"id": request.id, "images": request.images, "messages": request.messages}, where)
