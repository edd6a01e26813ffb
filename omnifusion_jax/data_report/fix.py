"""The clean set: the records of a data set that have no problem, as they were."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from omnifusion_jax.data.dialogues import Dialogue, from_record
from omnifusion_jax.data.mixture import Mixture
from omnifusion_jax.data.modality import content_parts, marked
from omnifusion_jax.data.sources import JsonSource
from omnifusion_jax.data_report.gather import USABLE, Gathered
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES

INSTEAD = "python -m omnifusion_jax.prepare_data --on_bad_sample=skip keeps such data, in files of its own"


def check_target(path: Path, data: Mixture, images: str) -> None:
    """Raises DataError, before anything is read, if the clean set of `data` cannot be written to `path`."""
    if path.suffix != ".json":
        raise DataError(f"--fix={path}: a JSON list is written; give a name that ends in .json")
    if path.exists():
        raise DataError(f"--fix={path} is there already, and is not overwritten. Give another name")
    if not path.parent.is_dir():
        raise DataError(f"--fix={path}: there is no folder {path.parent}. Make it, or give another name")
    if len(data.sources) > 1:
        raise DataError(f"--fix={path} writes one set, not {len(data.sources)}: choose it by --data=FILE")
    for i in range(min(len(data), 100)):
        try:
            dialogue = data.sources[0][i]
        except DataError:
            continue  # there is a report on it
        if not isinstance(data.sources[0], JsonSource):
            rebuilt(dialogue, images)
        return


def write_clean(path: Path, gathered: Gathered, data: Mixture, images: str) -> int:
    """Writes the records without problems as a JSON list, one after the other, and returns their number.

    Those of JSON and JSONL files are written as they are, byte for byte; others are made anew.

    Raises:
      DataError: there are none, or they cannot be rebuilt, or the file has appeared meanwhile.
    """
    (found,), (source,) = gathered.found, data.sources
    usable = (found.records["state"] == USABLE).nonzero()[0].tolist()
    if not usable:
        raise DataError(f"--fix={path}: no record is without a problem, so that nothing is written")
    take = original if isinstance(source, JsonSource) else lambda source, i: rebuilt(source[i], images)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(beside, "xb") as file:
            file.writelines(joined(take(source, i) for i in usable))
        os.link(beside, path)  # unlike a rename, it replaces nothing
    except FileExistsError:
        raise DataError(f"--fix={path} has appeared meanwhile, and is not overwritten") from None
    finally:
        beside.unlink(missing_ok=True)
    return len(usable)


def joined(records: Iterator[bytes]) -> Iterator[bytes]:
    """The pieces of a JSON list."""
    separator = b"[\n"
    for record in records:
        yield separator + record
        separator = b",\n"
    yield b"\n]\n"


def original(source: JsonSource, i: int) -> bytes:
    """The text of a record, without what separates it from the next."""
    start, end = source.index.starts[i : i + 2].tolist()
    return os.pread(source.file.fileno(), end - start, start).strip(b" \t\r\n,")


def rebuilt(dialogue: Dialogue, images: str) -> bytes:
    """A record that reads as this Dialogue, whose media are files relative to the folder `images`.

    Raises:
      DataError: its media are not in files.
    """
    for media in dialogue.media:
        if not isinstance(media.source, Path):
            raise DataError(f"{dialogue.where}: its {media.stream} is no file, which --fix needs. {INSTEAD}")
    names = {}
    for stream in dict.fromkeys(media.stream for media in dialogue.media):
        found = [os.path.relpath(file, images) if images else str(file) for file in dialogue.of(stream)]
        names[MODALITIES[stream].keys[-1]] = found
    said, answers = dialogue.turns, {}
    if dialogue.rejected is not None:
        said, answers = said[:-1], {"chosen": said[-1][1], "rejected": dialogue.rejected}
    if dialogue.marked:
        turns = [{"from": role, "value": text} for role, text in said]
        record = names | {"conversations": turns} | answers
    else:
        split = content if dialogue.parted else str
        turns = [{"role": role, "content": split(text)} for role, text in said]
        record = names | {"messages": turns} | answers
    again = from_record(record, dialogue.where, images)
    same = ("turns", "media", "marked", "parted", "rejected")
    if any(getattr(again, name) != getattr(dialogue, name) for name in same):
        raise DataError(f"{dialogue.where}: a JSON record cannot say the same. {INSTEAD}")
    return json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")


def content(text: str) -> str | list[dict]:
    """A turn as its message had it: parts where media are marked, each on a line of its own."""
    if not marked(text):
        return text
    parts = content_parts(text)
    for part, before, after in zip(parts, [None, *parts], [*parts[1:], None], strict=False):
        if part["type"] == "text":
            part["text"] = part["text"].removeprefix("\n" if before else "")
            part["text"] = part["text"].removesuffix("\n" if after else "")
    return [part for part in parts if part["type"] != "text" or part["text"]]
