"""The header: a file beside a file of answers that says what made them.

It keeps answers that were made in another way from being mixed with them.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.fingerprint import fingerprint
from omnifusion_jax.nested import flat

FORMAT = 1
# Fields that are written but not compared, since they change no answer
NAMES = ("model", "config.preset", "config.filled_from")
SHOWN = 12  # how many differences an error lists


def beside(target: Path) -> Path:
    """The path of the header of a file of answers."""
    return target.with_name(target.name + ".header.json")


def header(model, images, generation: GenerationConfig) -> dict:
    """Everything except the requests that determines the answers of a Model, as values of JSON."""
    made = {
        "format": FORMAT,
        "model": model.name,
        **fingerprint(model),
        "images": str(images),
        "generation": dataclasses.asdict(generation),
    }
    return json.loads(json.dumps(made))


def read(target: Path) -> dict:
    """The header of a file that holds answers.

    Raises:
      DataError: the header is missing or damaged.
    """
    file = beside(target)
    advice = "Put it back if you have it; else give another output, or remove this one"
    if not file.is_file():
        raise DataError(
            f"{target} holds answers, but {file.name}, which says what made them, is missing. {advice}"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not (isinstance(found, dict) and isinstance(found.get("requests"), dict)):
        raise DataError(f"{file} is damaged: it should say what made the answers in {target}. {advice}")
    return found


def write(target: Path, made: dict, asked):
    """Writes the header of `target`; `asked` is an Asked of the answered requests."""
    made = {**made, "requests": asked.told()}
    text = json.dumps(made, ensure_ascii=False, indent=1) + "\n"
    replace(beside(target), text.encode(errors="backslashreplace"))


class Asked:
    """A running hash of Requests that have been answered, in the order of their rows.

    Those whose answers are errors are left out, since they may be corrected and tried again.
    """

    def __init__(self, requests):
        self.requests, self.count = requests, 0
        self.hash = hashlib.sha256(requests.fingerprint.encode())

    def add(self, rows, until: int | None = None):
        """Adds the requests of the Rows that are not added yet, up to the row `until`; returns itself."""
        for number in range(self.count, len(rows) if until is None else until):
            failed = rows.failed[number]
            self.hash.update(b"" if failed else self.requests.content(rows.answered[number]))
            self.count += 1
        return self

    def told(self):
        return {"answered": self.count, "digest": self.hash.hexdigest()[:16]}


def replace(file, content):
    """Replaces a file in one step, so that a run that is cut off leaves the old content or the new."""
    new = file.with_name(file.name + ".new")
    with open(new, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)


def check_requests(target: Path, theirs: dict, requests, rows):
    """Checks that the Requests whose answers the header counts have not changed since.

    Raises:
      DataError: a request was changed after it was answered.
    """
    n = theirs["requests"].get("answered")
    if n in range(len(rows) + 1) and Asked(requests).add(rows, n).told() != theirs["requests"]:
        raise DataError(
            f"{target}: one of the first {n} requests was changed after it was answered. "
            "Give another output, or remove this one"
        )


def agree(target: Path, theirs: dict, ours: dict):
    """Checks that the answers in `target` were made as ours would be.

    Raises:
      DataError: they were not; the message lists the settings that differ.
    """
    made = {key: value for key, value in theirs.items() if key != "requests"}
    old, new = flat(made), flat(ours)
    wrong = [name for name in {**old, **new} if name not in NAMES and old.get(name) != new.get(name)]
    if not wrong:
        return
    wrong = [name for name in NAMES[:1] if old.get(name) != new.get(name)] + wrong
    lines = [f"  {name}: {show(old, name)} -> {show(new, name)}" for name in wrong[:SHOWN]]
    if len(wrong) > SHOWN:
        lines.append(f"  and {len(wrong) - SHOWN} more")
    advice = f"Run with the settings in {beside(target).name}, give another output, or remove this one"
    raise DataError(
        f"{target} was made by another model or with other settings:\n" + "\n".join(lines) + f"\n{advice}"
    )


def show(values, name):
    text = json.dumps(values[name], ensure_ascii=False) if name in values else "nothing"
    if len(text) <= 120:
        return text
    short = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]  # tells apart what is left out
    return f"{text[:50]} ... {text[-50:]} ({short})"
