"""Answers a file of requests in order, and continues where an earlier run stopped."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import from_record
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference import header
from omnifusion_jax.inference.model import Answer, Model

START = b'{"id": '  # how every answer begins


class Summary(NamedTuple):
    answers: int  # in the file of answers
    errors: int  # answers that are errors
    kept: int  # answers that were already there
    retried: int  # kept answers that were errors and have been tried again


def answer_file(
    model: Model,
    source: Path,
    target: Path,
    images: str | Path,
    generation: GenerationConfig,
    batch_size: int = 16,
    retry_errors: bool = False,
) -> Summary:
    """Answers the request lines of `source` and writes the answers to `target` in the same order.

    An answer is a line {"id", "text", "tokens", "finish_reason", "error"}. A file beside it,
    `TARGET.header.json`, says what made the answers: model, settings and folder of pictures. If these are
    still the same, a run that was cut off continues. The answer to a bad line holds its error; the other
    lines are answered all the same.

    Args:
      source: JSONL of {"id", "images", "messages"}, or of LLaVA records, whose last assistant turn is removed
        for the model to answer.
      images: the folder to which names of pictures are relative.
      retry_errors: requests whose answers in `target` are errors are tried again and the answers replaced;
        all other answers stay the same, byte for byte.

    Raises:
      DataError: `source` is missing, `target` does not belong to it, or `target` was made by another model or
        with other settings.
    """
    if not source.is_file():
        raise DataError(f"{source} does not exist: it should hold one request a line")
    numbered = enumerate(read_text(source).split("\n"), 1)
    lines = [(f"{source}:{n}", line) for n, line in numbered if line.strip()]
    if target.resolve() == source.resolve():
        raise DataError(f"{target} is the file of requests: give another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = finished(target, lines)
    made = header.header(model, images, generation)
    texts = [line for _, line in lines]
    failed, kept = list(map(is_error, rows)), len(rows)
    if rows:
        theirs = header.read(target)
        header.agree(target, theirs, made)
        header.check_requests(target, theirs, texts, failed)
        os.truncate(target, sum(map(len, rows)))  # removes a last line that was cut off
    else:
        header.write(target, made, header.Asked())
        target.write_bytes(b"")
    again = [i for i in range(kept) if failed[i]] if retry_errors else []

    def answer(chosen):
        return answer_lines(model, [lines[i] for i in chosen], images, generation, batch_size)

    for chosen in portions(again, 4 * batch_size):  # portions, so that a run that is cut off loses little
        for i, row in zip(chosen, answer(chosen), strict=True):
            rows[i], failed[i] = row, is_error(row)
        # Until both files are written they do not match, so the header claims no answered requests.
        header.write(target, made, header.Asked())
        header.replace(target, b"".join(rows))
    asked = header.Asked().add(texts[:kept], failed)
    header.write(target, made, asked)
    with open(target, "ab") as out:
        for chosen in portions(range(kept, len(lines)), 4 * batch_size):
            new = answer(chosen)
            out.write(b"".join(new))
            out.flush()
            failed += map(is_error, new)
            header.write(target, made, asked.add([texts[i] for i in chosen], [failed[i] for i in chosen]))
    return Summary(len(failed), sum(failed), kept, len(again))


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


def portions(indices, size):
    """Slices of at most `size` indices."""
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def answer_lines(model, lines, images, generation, batch_size):
    """The answers to lines (where, text), as rows of bytes."""
    read = [(where, *read_line(line, where, images, model.prepare.layout)) for where, line in lines]
    requests = [request for _, request, _, error in read if error is None]
    answers = enumerate(model.generate(requests, generation, batch_size=batch_size, on_error="record"))
    rows = []
    for where, _, name, error in read:
        i, answer = next(answers) if error is None else (None, Answer(finish_reason="error", error=error))
        # The error names the request's place in the portion; what a reader needs is its place in the file.
        error = answer.error and answer.error.replace(f"request {i}", where, 1)
        row = {
            "id": name,
            "text": answer.text,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "error": error,
        }
        line = json.dumps(row, ensure_ascii=False) + "\n"
        rows.append(line.encode(errors="backslashreplace"))  # a lone surrogate is escaped, as in JSON
    return rows


def is_error(row):
    return json.loads(row)["finish_reason"] == "error"


def finished(target, lines):
    """The complete answers in `target`, as rows of bytes with their line ends.

    Raises:
      DataError: the file holds answers to other requests, or something other than answers.
    """
    if not target.exists():
        return []
    data = target.read_bytes()  # not text: a file that was cut off may end within a character
    *rows, rest = split(data)
    try:
        answers = [json.loads(row) for row in rows]
        ids = [(answer["id"], answer["finish_reason"] == "error") for answer in answers]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{target} holds something else than answers: give another output") from None
    if not START.startswith(rest[: len(START)]):
        raise DataError(f"{target} holds something else than answers: give another output")
    for (name, failed), (where, line) in zip(ids, lines, strict=False):
        # A line that could not be read has its number for an id. It may have been corrected since.
        corrected = failed and name == line_number(where)
        if name != line_id(line, where) and not corrected:
            raise DataError(
                f"{target} holds answers to other requests than {where}: give another output, or remove it"
            )
    if len(ids) > len(lines):
        raise DataError(
            f"{target} holds more answers than there are requests: give another output, or remove it"
        )
    return rows


def split(data):
    """The lines of `data` with their line ends, and last of all what follows the last line end."""
    *lines, rest = data.split(b"\n")
    return [*(line + b"\n" for line in lines), rest]


def line_id(line, where):
    """The request's own id, or its line number."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    name = record.get("id") if isinstance(record, dict) else None
    return line_number(where) if name is None else str(name)


def line_number(where):
    """The number at the end of FILE:NUMBER."""
    return where.rsplit(":", 1)[1]


def read_line(line, where, images, layout):
    """(Request or None, id, error message or None) of a line."""
    name = line_id(line, where)
    try:
        dialogue = from_record(json.loads(line), where, images)
        messages = layout.messages(dialogue)
        if messages[-1]["role"] == "assistant" and dialogue.marked:
            messages.pop()
        return dialogue.request(messages, name), name, None
    except json.JSONDecodeError as error:
        return None, name, f"{where}: not JSON ({error.msg}). Correct or remove the line"
    except DataError as error:
        return None, name, str(error)
