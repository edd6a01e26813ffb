"""A file of requests to a file of answers, in order, continued where an earlier run stopped."""

import json
import os
from typing import NamedTuple

from omnifusion_jax.data.dialogues import Request, from_record
from omnifusion_jax.data.sources import read_text
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference import header
from omnifusion_jax.inference.model import Answer

START = b'{"id": '  # of every answer


class Summary(NamedTuple):
    answers: int  # in the file of answers
    errors: int  # of them
    kept: int  # of them were there already
    retried: int  # of those were errors and have been tried again


def answer_file(model, source, target, images, generation, batch_size=16, retry_errors=False):
    """Answers the request lines of `source` into `target`, in their order.

    An answer is a line {"id", "text", "tokens", "finish_reason", "error"}.
    A file beside it, `TARGET.header.json`, says what made the answers: model, settings, folder of pictures. A
    run that was cut off goes on if they are the same; a bad line gets an answer that tells its error and
    never stops the others.

    Args:
      source: JSONL of {"id", "images", "messages"}, or of LLaVA records, whose last assistant turn is left
        for the model to give.
      images: folder that names of pictures are relative to.
      retry_errors: lines of `target` that are errors are tried again and replaced; all others stay as they
        are, byte for byte.

    Returns a Summary. Raises DataError when `source` is missing, `target` does not belong to it, or another
    model or other settings made it.
    """
    if not source.is_file():
        raise DataError(f"{source} does not exist: it should hold one request a line")
    lines = [
        (f"{source}:{n}", line) for n, line in enumerate(read_text(source).split("\n"), 1) if line.strip()
    ]
    if target.resolve() == source.resolve():
        raise DataError(f"{target} is the file of requests: give another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    rows, made, texts = (
        finished(target, lines),
        header.header(model, images, generation),
        [line for _, line in lines],
    )
    failed, kept = list(map(is_error, rows)), len(rows)
    if rows:
        theirs = header.read(target)
        header.agree(target, theirs, made)
        header.check_requests(target, theirs, texts, failed)
        os.truncate(target, sum(map(len, rows)))  # a line that was cut off
    else:
        header.write(target, made, header.Asked())
        target.write_bytes(b"")
    again = [i for i in range(kept) if failed[i]] if retry_errors else []

    def answer(chosen):
        return answer_lines(model, [lines[i] for i in chosen], images, generation, batch_size)

    for chosen in portions(again, 4 * batch_size):  # portions, so that a cut-off run loses little
        for i, row in zip(chosen, answer(chosen), strict=True):
            rows[i], failed[i] = row, is_error(row)
        header.write(target, made, header.Asked())  # claims nothing while the two files are not of one time
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


def portions(indices, size):
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def answer_lines(model, lines, images, generation, batch_size):
    """The rows, as bytes, that answer some lines (where, text)."""
    read = [(where, *read_line(line, where, images, model.prepare.layout)) for where, line in lines]
    requests = [request for _, request, _, error in read if error is None]
    answers, rows = (
        enumerate(model.generate(requests, generation, batch_size=batch_size, on_error="record")),
        [],
    )
    for where, _, name, error in read:
        i, answer = next(answers) if error is None else (None, Answer(finish_reason="error", error=error))
        error = answer.error and answer.error.replace(
            f"request {i}", where, 1
        )  # its place in the file, not in the portion
        row = {
            "id": name,
            "text": answer.text,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "error": error,
        }
        rows.append(
            (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
        )  # half a character, as JSON spells it
    return rows


def is_error(row):
    return json.loads(row)["finish_reason"] == "error"


def finished(target, lines):
    """The whole answers that `target` holds, as bytes with their line ends.

    Raises DataError when they answer other requests, or are no answers.
    """
    if not target.exists():
        return []
    data = target.read_bytes()  # a cut may run through a character
    *rows, rest = split(data)
    try:
        answers = [json.loads(row) for row in rows]
        ids = [answer["id"] for answer in answers if answer["finish_reason"]]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{target} holds something else than answers: give another output") from None
    if not START.startswith(rest[: len(START)]):
        raise DataError(f"{target} holds something else than answers: give another output")
    for name, (where, line) in zip(ids, lines, strict=False):
        if name != line_id(line, where):
            raise DataError(
                f"{target} holds answers to other requests than {where}: give another output, or remove it"
            )
    if len(ids) > len(lines):
        raise DataError(
            f"{target} holds more answers than there are requests: give another output, or remove it"
        )
    return rows


def split(data):
    """Lines of bytes with their ends, and what follows the last end."""
    *lines, rest = data.split(b"\n")
    return [*(line + b"\n" for line in lines), rest]


def line_id(line, where):
    """The request's own id, or its line number."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    name = record.get("id") if isinstance(record, dict) else None
    return where.rsplit(":", 1)[1] if name is None else str(name)


def read_line(line, where, images, layout):
    """(Request or None, id, what is wrong or None)."""
    name = line_id(line, where)
    try:
        dialogue = from_record(json.loads(line), where, images)
        messages = layout.messages(dialogue)
        if messages[-1]["role"] == "assistant" and dialogue.marked:
            messages.pop()
        return Request(messages, list(dialogue.images), name), name, None
    except json.JSONDecodeError as error:
        return None, name, f"{where}: not JSON ({error.msg}). Correct or remove the line"
    except DataError as error:
        return None, name, str(error)
