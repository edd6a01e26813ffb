"""Which members of a tar shard a record shows as its pictures."""

import os
from collections.abc import Collection, Iterable

from omnifusion_jax.data.dialogues import IMAGE
from omnifusion_jax.data.images import short
from omnifusion_jax.data.modality import NEXT, first_given
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES


def with_pictures(record, names: list[str]):
    """The record, with the names as its pictures if it names none itself."""
    keys = MODALITIES[IMAGE].keys
    if not isinstance(record, dict) or first_given(record, keys, []) or any(map(named, parts_of(record))):
        return record
    return record | dict.fromkeys(keys) | {keys[-1]: names}


def parts_of(record: dict) -> Iterable:
    """The parts of its messages; what is no message or part is refused elsewhere."""
    messages = record.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        yield from content if isinstance(content, list) else ()


def named(part) -> bool:
    """Whether it is a picture that it names itself."""
    kinds = MODALITIES[IMAGE].parts
    kind = part.get("type") if isinstance(part, dict) else None
    try:
        return kind in tuple(kinds) and kinds[kind](part, "") is not NEXT
    except DataError:  # it should name one; the reason is given where it is read
        return True


def number(extension: str) -> int:
    """By which pictures are sorted: 3 of "3.jpg"."""
    first = extension.split(".")[0]
    return int(first) if first.isdecimal() else -1


def extension_of(name: str, key: str, extensions: Collection[str]) -> str:
    """The extension of the picture that a record names: by its whole name, that without folders, or "1.png".

    Raises:
      DataError: the sample, whose members begin with `key`, has no such picture.
    """
    known = {f"{key}.{extension}".lower(): extension for extension in extensions}
    known |= {os.path.basename(whole): extension for whole, extension in known.items()}
    known |= {extension: extension for extension in extensions}
    wanted = name.lower()
    found = known.get(wanted, known.get(os.path.basename(wanted)))
    if found is None:
        here = ", ".join(f"{key}.{extension}" for extension in extensions) or "of which it has none"
        raise DataError(
            f"{short(name)} is not one of the sample's pictures, {here}. "
            "Name one of them, or name none: then all are shown",
            "missing",
        )
    return found
