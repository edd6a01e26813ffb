"""Reads dialogues in the forms in which people write them: LLaVA's, MiniCPM-V's, or messages with roles."""

import dataclasses
import difflib
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omnifusion_jax.data.by_name import in_order_of_names
from omnifusion_jax.data.images import is_data_url, is_url, short
from omnifusion_jax.data.modality import NEXT, first_given, marked, streams_by_mark
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# LLaVA's form and OpenAI's: the key of the list of turns, and the keys of a turn's speaker and content
FORMS = (("conversations", "from", "value"), ("messages", "role", "content"))
# What else a record may hold, besides media: its name, a pair of answers, and Alpaca's form
KEYS = ("id", "question", "chosen", "rejected", "instruction", "input", "output")
IMAGE = "image"  # the stream of pictures


@dataclasses.dataclass
class Request:
    """A question to a model: pictures (path, data URL, PIL image or uint8 array) and the dialogue so far.

    `messages` are `[{"role": "user", "content": "What is it?"}]`; `content` may be a list of parts, as in
    OpenAI's form. Errors name the request by its `id`, which also seeds its random numbers; without an `id`,
    its place in the list does both. `media` holds the items of other streams: {stream: list}.
    """

    messages: list
    images: list = dataclasses.field(default_factory=list)
    id: str | None = None
    media: dict[str, list] = dataclasses.field(default_factory=dict)


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
    # an answer that is worse than the last turn; None: there is none to compare
    rejected: str | None = None
    unread: tuple[str, ...] = ()  # keys of the record that nothing reads

    @property
    def images(self) -> tuple:
        """The sources of its pictures."""
        return self.of(IMAGE)

    def of(self, stream: str) -> tuple:
        """The sources of its media of a stream, in order."""
        return tuple(media.source for media in self.media if media.stream == stream)

    def request(
        self, messages: list, id: str | None = None, items: Mapping[str, int] | None = None
    ) -> Request:
        """A Request of `messages` and its media; `items`: only the first items[stream] of each stream."""
        streams = dict.fromkeys(media.stream for media in self.media)
        listed = {stream: list(self.of(stream)) for stream in streams}
        if items is not None:
            listed = {stream: found[: items.get(stream, 0)] for stream, found in listed.items()}
        return Request(messages, listed.pop(IMAGE, []), id, listed)


def parse(record: Any, where: str) -> Dialogue:
    """The Dialogue of a record of either form. Raises DataError, which names `where`."""
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: a dialogue is an object with 'conversations' or 'messages', "
            f"this is a {type(record).__name__}",
            "form",
        )
    dialogue, names = read(record, where), unread(record)
    check_unread(dialogue, names)
    return dataclasses.replace(dialogue, unread=names) if names else dialogue


def read(record, where):
    """The Dialogue of a record, which is a dict."""
    if {"chosen", "rejected"} <= record.keys():
        return preference(record, where)
    if record.get("id") is not None:
        where = f'{where} (id "{record["id"]}")'
    listed = {stream: given_list(record, MODALITIES[stream].keys) for stream in MODALITIES.names()}
    for key, role, text in FORMS:
        if key in record:
            if key == "conversations" and by_role(record[key]):
                _, role, text = FORMS[1]
            found = turns(record[key], role, text, f"{where}: {key}")
            found, listed = in_order_of_names(found, listed, where)
            if role == "from":
                return Dialogue(where, found, in_order(found, listed), marked=True)
            return Dialogue(where, *assembled(found, listed, where))
    if "instruction" in record and "output" in record:
        return Dialogue(where, instruction(record, where))
    keys = ", ".join(map(str, record)) or "nothing"
    raise DataError(
        f"{where}: there is neither 'conversations' (LLaVA) nor 'messages' in it, only {keys}", "form"
    )


def media_keys() -> dict[str, str]:
    """{key under which a record lists media: their stream}"""
    return {key: stream for stream in MODALITIES.names() for key in MODALITIES[stream].keys}


def unread(record) -> tuple[str, ...]:
    """The keys of a record that hold something and that nothing reads; messages[].KEY is one of its turns."""
    form = next((form for form, *_ in FORMS if form in record), None)
    read = {form, *KEYS, *media_keys()}
    found = [key for key in held(record) if key not in read]
    turns = record[form] if isinstance(record.get(form), list) else []
    said = {key for _, *keys in FORMS for key in keys}
    found += [f"{form}[].{key}" for turn in turns for key in held(turn) if key not in said]
    return tuple(dict.fromkeys(found))


def held(record):
    """The keys of what is perhaps a dict, without those whose value is empty."""
    nothing = lambda value: value is None or (isinstance(value, str | list | dict) and not value)
    return [key for key, value in record.items() if not nothing(value)] if isinstance(record, dict) else []


def check_unread(dialogue, names):
    """Raises DataError if the media of a dialogue without any seem to stand under one of the unread keys."""
    keys = media_keys()
    for name in names:
        meant = resembling(str(name).rpartition(".")[2], tuple(keys))
        if meant and not dialogue.of(keys[meant]):
            raise DataError(
                f'{dialogue.where}: nothing reads "{name}", and "{meant}" beside the turns is not given. '
                "If that is meant, rename it; else remove it",
                "media",
            )


@functools.lru_cache
def resembling(name: str, known: tuple[str, ...]) -> str | None:
    """The known key that a name is but for a slip; None if there is none."""
    return next(iter(difflib.get_close_matches(name.casefold(), known, 1, 0.8)), None)


def by_role(items):
    """Whether turns are those of MiniCPM-V's data: as in messages, under the name that LLaVA's have."""
    return isinstance(items, list) and any(isinstance(turn, dict) and "role" in turn for turn in items)


def preference(record, where):
    """The Dialogue of a question and of two answers to it, `chosen` and `rejected`.

    The question is a string, or else the turns of either form.
    """
    asked = {name: value for name, value in record.items() if name not in ("chosen", "rejected")}
    if "question" in record:
        asked["messages"] = [{"role": "user", "content": record["question"]}]
    dialogue = read(asked, where)
    for name in ("chosen", "rejected"):
        answer = record[name]
        if not isinstance(answer, str):
            raise DataError(f"{dialogue.where}: {name} is no string", "form")
        check_characters(answer, f"{dialogue.where}: {name}")
        if not answer.strip():
            raise DataError(
                f"{dialogue.where}: {name} is empty. Write its text, or remove the pair", "empty_side"
            )
    answer = ("gpt" if dialogue.marked else "assistant", record["chosen"])
    return dataclasses.replace(dialogue, turns=(*dialogue.turns, answer), rejected=record["rejected"])


def instruction(record, where):
    """The turns of a record in Alpaca's form, which has no media."""
    parts = [record["instruction"], record.get("input") or "", record["output"]]
    for name, part in zip(("instruction", "input", "output"), parts, strict=True):
        if not isinstance(part, str):
            raise DataError(f"{where}: {name} is no string", "form")
        check_characters(part, f"{where}: {name}")
    return ("user", "\n".join(filter(None, parts[:2]))), ("assistant", parts[2])


def given_list(record, keys):
    """The media items that a record lists under the first of `keys` that is given, as a tuple."""
    found = first_given(record, keys, ())
    return tuple(found) if isinstance(found, list | tuple) else (found,)


def in_order(turns, listed):
    """The listed media in the order of the marks in the turns.

    Those of a stream with more or fewer marks than items, which layouts refuse or show in an order of their
    own, follow at the end, as do all without marks.
    """
    streams = streams_by_mark()
    marked_so = [streams[mark] for _, text in turns for mark in marked(text)]
    agree = {stream for stream, items in listed.items() if len(items) == marked_so.count(stream)}
    order = [stream for stream in marked_so if stream in agree]
    order += [stream for stream, items in listed.items() if stream not in agree for _ in items]
    rest = {stream: iter(items) for stream, items in listed.items()}
    return tuple(Media(stream, next(rest[stream])) for stream in order)


def turns(items, role, text, where):
    """((role, text or list of parts), ...): the turns as written, under their keys `role` and `text`."""
    if not isinstance(items, list) or not items:
        raise DataError(f"{where} is not a list of turns, or is empty", "form")
    kinds, parts = str, ""
    if text == "content":  # only OpenAI's form has lists of parts
        kinds, parts = (str, list), ", or a list of parts"
    for i, turn in enumerate(items):
        right = (
            isinstance(turn, dict) and isinstance(turn.get(role), str) and isinstance(turn.get(text), kinds)
        )
        if not right:
            raise DataError(
                f"{where}[{i}] is not an object with the strings {role!r} and {text!r}{parts}", "form"
            )
        if isinstance(turn[text], str):
            check_characters(turn[text], f"{where}[{i}]")
    return tuple((turn[role], turn[text]) for turn in items)


def assembled(turns, listed, where):
    """The fields of a Dialogue after `where`, from turns whose content may be a list of parts.

    Parts are joined by newlines, and each media item becomes a mark. A part that names no media item, such
    as {"type": "image"}, takes the next of those that are listed beside the messages for its stream.
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
        written = [part if isinstance(part, str) else MODALITIES[part.stream].mark for part in parts]
        spoken.append((role, "\n".join(written)))
        said += [part for part in parts if isinstance(part, str)]
        shown += [part for part in parts if isinstance(part, Media)]
    if not shown:
        return tuple(spoken), in_order(spoken, listed)
    if any(map(marked, said)):
        marks = ", ".join(streams_by_mark())
        raise DataError(
            f"{where}: media stand as parts, and the text has marks of its own ({marks}). Remove the marks",
            "marks",
        )
    for stream, items in listed.items():
        wanted = sum(media.stream == stream and media.source is NEXT for media in shown)
        if wanted != len(items):
            raise DataError(
                f'{where}: {wanted} "{stream}" parts name no file, and "{MODALITIES[stream].keys[-1]}" lists '
                f"{len(items)}. Each takes one of them, in order",
                "marks",
            )
    rest = {stream: iter(items) for stream, items in listed.items()}
    media = tuple(one._replace(source=next(rest[one.stream])) if one.source is NEXT else one for one in shown)
    return tuple(spoken), media, False, True


def read_part(part, where):
    """The text or the Media of one part of a turn's content. Raises DataError, which names `where`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where} has no string 'text'", "part")
        check_characters(part["text"], where)
        return part["text"]
    streams = {name: stream for stream in MODALITIES.names() for name in MODALITIES[stream].parts}
    if kind not in streams:
        known = ", ".join(["text", *streams])
        raise DataError(
            f"{where} is of type {kind!r}; known are {known}. Leave it out or say it in text", "part"
        )
    stream = streams[kind]
    return Media(stream, MODALITIES[stream].parts[kind](part, where))


def check_characters(text, where):
    """Raises DataError for text that UTF-8 cannot encode, as a tokenizer must."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where} holds half a character (an unpaired surrogate, as of an emoji cut in two). "
            "Correct its text",
            "characters",
        ) from None


def from_record(record: Any, where: str, folder: str | Path) -> Dialogue:
    """The Dialogue of a record of a data file, where media are data URLs or file names relative to `folder`.

    Raises:
      DataError: the record has neither form, or media of another type; the message names `where`.
    """
    dialogue = parse(record, where)
    try:
        found = tuple(Media(stream, located(source, stream, folder)) for stream, source in dialogue.media)
    except DataError as error:
        raise error.at(dialogue.where) from error
    return dataclasses.replace(dialogue, media=found)


def located(source: Any, stream: str, folder: str | Path) -> Path | str | bytes:
    """What a record holds for a media item: its file, its data URL or its bytes.

    With a `folder` nothing outside of it is read, whatever a name, a link or `..` says. {"bytes", "path"} is
    how Hugging Face data sets hold pictures.

    Raises:
      DataError: the source is none of these, or lies outside.
    """
    if isinstance(source, Mapping) and {"bytes", "path"} <= source.keys():
        source = source["path"] if source["bytes"] is None else source["bytes"]
    if isinstance(source, bytes) or is_url(source) or is_data_url(source):
        return source  # not relative to a folder
    if not isinstance(source, str):
        kind = type(source).__name__
        raise DataError(f'"{stream}" must name a file or a list of files, not hold a {kind}', "media")
    if not str(folder) or str(folder) == ".":
        return Path(source)
    try:
        real, inside = os.path.realpath(os.path.join(folder, source)), real_folder(folder)
    except (ValueError, OSError):  # a name with a NUL byte, or a circle of links
        raise DataError(f"{source!r}: there is no such file. Check the name", "missing") from None
    if not real.startswith(inside):
        raise DataError(
            f"{short(source)} lies outside the folder of pictures, {folder}. "
            "Name a folder that holds all of them",
            "outside",
        )
    return Path(folder, source)


@functools.cache
def real_folder(folder):
    """A folder without links in its path, with a "/" at its end."""
    return os.path.join(os.path.realpath(folder), "")


def from_request(request: Request, where: str = "request") -> Dialogue:
    """The Dialogue of a Request. Raises DataError, which names `where` and its `id`."""
    record = {"id": request.id, "images": request.images, "messages": request.messages}
    for stream, items in request.media.items():
        if stream == IMAGE or stream not in MODALITIES.names():
            known = [name for name in MODALITIES.names() if name != IMAGE]
            raise DataError(
                f"{where}: media hold {stream!r}; known are {', '.join(known) or 'none'}, and pictures "
                "belong in images",
                "media",
            )
        record[MODALITIES[stream].keys[0]] = items
    return parse(record, where)
