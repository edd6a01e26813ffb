"""Where dialogues come from."""

import hashlib
import json
from pathlib import Path
from typing import Protocol

from omnifusion_jax.data import questions, synthetic
from omnifusion_jax.data.dialogues import IMAGE, Dialogue, Media, from_record
from omnifusion_jax.data.images import is_data_url, is_url, short
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES

ENDLESS = 2**30  # synthetic samples in an epoch


class Source(Protocol):
    """Dialogues by number: always the same one at an index.

    A source may have a `fingerprint`, a string that differs for other data; a continued run requires the same
    one.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Dialogue:
        """Raises DataError for a record that cannot be used; other records can be asked for all the same."""


class JsonSource:
    """A LLaVA JSON list or a JSONL file, held in memory; pictures are named relative to the folder `images`.

    The `fingerprint` covers the text of the file, not the pictures that it names.

    Raises:
      DataError: the file cannot be read or has no dialogues. A broken record raises it when asked for.
    """

    def __init__(self, path: str | Path, images: str | Path = ""):
        self.path, self.images = Path(path), Path(images)
        self.records = self.read()
        if not self.records:
            raise DataError(f"{path} holds no dialogues")

    def read(self):
        """[(where, record, None)] of the file, and for broken lines [(where, None, problem)]."""
        if self.path.is_dir():
            inside = sorted(file for file in self.path.iterdir() if file.suffix in (".json", ".jsonl"))
            example = inside[0] if inside else self.path / "dialogues.json"
            raise DataError(f"{self.path} is a folder: give the file in it, e.g. {example}")
        if not self.path.is_file():
            raise DataError(
                f"{self.path} does not exist: data.path names a LLaVA JSON or JSONL file, "
                "or synthetic:captions"
            )
        text = read_text(self.path)
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        if not text.strip():
            return []
        if self.path.suffix == ".jsonl":
            return [self.line(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{self.path}:{error.lineno}: not JSON ({error.msg}). "
                "A file with one object a line must be named .jsonl"
            ) from None
        if not isinstance(records, list):
            raise DataError(
                f"{self.path}: a list of dialogues is expected, this is a {type(records).__name__}. "
                "Put it in [ ]"
            )
        return [(f"{self.path}[{i}]", record, None) for i, record in enumerate(records)]

    def line(self, number, line):
        where = f"{self.path}:{number}"
        try:
            return where, json.loads(line), None
        except json.JSONDecodeError as error:
            return where, None, f"{where}: not JSON ({error.msg}). Correct or remove the line"

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int) -> Dialogue:
        where, record, problem = self.records[i]
        if problem:
            raise DataError(problem)
        return from_record(record, where, self.images)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, to be split into lines at "\\n" alone.

    `splitlines` would also split at characters that JSON strings may hold.

    Raises:
      DataError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}). Save it as UTF-8") from None


def captions(scene, rng):
    language = questions.LANGUAGES[rng.integers(2)]
    return [(language.describe, questions.caption(scene, language))]


def several_questions(scene, rng):
    return questions.questions(scene, rng, int(rng.integers(1, 5)))


def one_question(scene, rng):
    return questions.questions(scene, rng, 1)


def anything(scene, rng):
    return captions(scene, rng) if rng.random() < 0.2 else several_questions(scene, rng)


# kind -> (split, what is said, whether a map in words replaces the picture)
SYNTHETIC = {
    "captions": ("train", captions, False),
    "questions": ("train", several_questions, False),
    "text": ("train", anything, True),
    "held-out": ("held-out", one_question, False),
    "held-out-text": ("held-out", one_question, True),
}


class SyntheticSource:
    """Dialogues about pictures drawn on the fly, of a kind in SYNTHETIC.

    `side` is the number of patches a side, for maps in words. Raises DataError for an unknown kind.
    """

    def __init__(self, kind: str, side: int):
        if kind not in SYNTHETIC:
            raise DataError(f"there is no synthetic:{kind}; choose from {', '.join(SYNTHETIC)}")
        self.kind, self.side, self.fingerprint = kind, side, f"synthetic:{kind}"
        self.split, self.say, self.in_words = SYNTHETIC[kind]

    def __len__(self):
        return ENDLESS

    def __getitem__(self, i: int) -> Dialogue:
        scene, rng = synthetic.scene_and_rng(i, self.split)
        turns = []
        for question, answer in self.say(scene, rng):
            turns += [("user", question), ("assistant", answer)]
        if self.in_words:
            turns[0] = ("user", " ".join([*synthetic.patch_words(scene, self.side), turns[0][1]]))
        media = () if self.in_words else (Media(IMAGE, synthetic.render(scene, rng)),)
        return Dialogue(f"synthetic:{self.kind}[{i}]", tuple(turns), media)


@SOURCES.row("synthetic")
def synthetic_source(rest: str, images: str, side: int) -> Source:
    return SyntheticSource(rest, side)


def open_source(path: str, images: str, side: int) -> Source:
    """The source at a path: a JSON or JSONL file, or what a row of SOURCES opens.

    `synthetic:captions` calls the row "synthetic" with "captions", `images` and `side`, the number of patches
    a side of a picture.

    Raises:
      DataError: the source does not exist or cannot be read.
    """
    if is_url(path) or is_data_url(path):
        raise DataError(f"data.path={short(path)} is not fetched: download it, and give the path of the file")
    name, colon, rest = path.partition(":")
    if colon and name in SOURCES.names():
        return SOURCES[name](rest, images, side)
    return JsonSource(path, images)
