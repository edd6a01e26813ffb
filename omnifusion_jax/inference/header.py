"""The file beside a file of answers: what made them. Answers of other makings are not mixed with them."""

import dataclasses
import hashlib
import json
import os

from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.fingerprint import fingerprint

FORMAT = 1
NAMES = ("model", "config.preset", "config.filled_from")  # told, not compared: they change no answer
SHOWN = 12  # differences that are listed


def beside(target):
    return target.with_name(target.name + ".header.json")


def header(model, images, generation):
    """What the answers of a Model follow from, besides the requests, as JSON has it."""
    made = {
        "format": FORMAT,
        "model": model.name,
        **fingerprint(model),
        "images": str(images),
        "generation": dataclasses.asdict(generation),
    }
    return json.loads(json.dumps(made))


def read(target):
    """The header beside a file that holds answers. Raises DataError where it is lost or damaged."""
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


def write(target, made, asked):
    made = {**made, "requests": asked.told()}
    replace(
        beside(target),
        (json.dumps(made, ensure_ascii=False, indent=1) + "\n").encode(errors="backslashreplace"),
    )


class Asked:
    """A running hash of the requests that have been answered.

    Errors are left out of it: such a line may be corrected and tried again.
    """

    def __init__(self):
        self.count, self.hash = 0, hashlib.sha256()

    def add(self, lines, failed):
        """Goes on with lines of text, of which `failed` (bool each) say that the answer is an error.

        Returns itself.
        """
        for line, fails in zip(lines, failed, strict=True):
            self.count += 1
            self.hash.update(b"" if fails else line.strip().encode(errors="surrogatepass"))
        return self

    def told(self):
        return {"answered": self.count, "digest": self.hash.hexdigest()[:16]}


def replace(file, content):
    """Writes a file at once: whoever reads it, or cuts this short, has the old or the new."""
    new = file.with_name(file.name + ".new")
    with open(new, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, file)


def check_requests(target, theirs, lines, failed):
    """Raises DataError where a request is not what it was when it was answered, as far as the header knows."""
    n = theirs["requests"].get("answered")
    if n in range(len(failed) + 1) and Asked().add(lines[:n], failed[:n]).told() != theirs["requests"]:
        raise DataError(
            f"{target}: one of the first {n} requests was changed after it was answered. Give another output, or remove this one"
        )


def agree(target, theirs, ours):
    """Raises DataError with the settings in which the answers there were made otherwise."""
    old, new = flat({key: value for key, value in theirs.items() if key != "requests"}), flat(ours)
    wrong = [name for name in {**old, **new} if name not in NAMES and old.get(name) != new.get(name)]
    if not wrong:
        return
    wrong = [name for name in NAMES[:1] if old.get(name) != new.get(name)] + wrong
    lines = [f"  {name}: {show(old, name)} -> {show(new, name)}" for name in wrong[:SHOWN]]
    lines += [f"  and {len(wrong) - SHOWN} more"] * (len(wrong) > SHOWN)
    advice = f"Run with the settings in {beside(target).name}, give another output, or remove this one"
    raise DataError(
        f"{target} was made by another model or with other settings:\n" + "\n".join(lines) + f"\n{advice}"
    )


def flat(value, name=""):
    """{"a.b": leaf} of nested objects."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        path: leaf
        for key, inner in value.items()
        for path, leaf in flat(inner, f"{name}.{key}" if name else key).items()
    }


def show(values, name):
    text = json.dumps(values[name], ensure_ascii=False) if name in values else "nothing"
    return (
        text
        if len(text) <= 120
        else f"{text[:50]} ... {text[-50:]} ({hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]})"
    )
