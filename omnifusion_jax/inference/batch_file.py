"""A file of requests to a file of answers, in order, continued where an earlier run stopped."""

import json
import os

from omnifusion_jax.data.dialogues import ROLES, Request, from_record
from omnifusion_jax.data.layout import check_marks, without_marks
from omnifusion_jax.data.sources import read_text
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.model import Answer

START = b'{"id": '  # of every answer


def answer_file(model, source, target, images, generation, batch_size=16):
    """Answers the request lines of `source` into `target`, one line each: {"id", "text", "tokens", "finish_reason", "error"}.

    Args:
      source: JSONL of {"id", "images", "messages"}, or of LLaVA records, whose last assistant turn is left for the model to give.
      images: folder that names of pictures are relative to.
    Returns: (answers written, how many of them are errors, answers that were there already). A bad line gets an answer that tells its error and
    never stops the others. Raises DataError when `source` is missing, or `target` does not belong to it.
    """
    if not source.is_file():
        raise DataError(f"{source} does not exist: it should hold one request a line")
    lines = [(f"{source}:{n}", line) for n, line in enumerate(read_text(source).split("\n"), 1) if line.strip()]
    if target.resolve() == source.resolve():
        raise DataError(f"{target} is the file of requests: give another output")
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = finished(target, lines)
    failed = 0
    with open(target, "a", encoding="utf-8", errors="backslashreplace") as out:  # half a character, as JSON spells it
        for start in range(kept, len(lines), 4 * batch_size):  # portions, so that a cut-off run loses little
            read = [(where, *read_line(line, where, images)) for where, line in lines[start : start + 4 * batch_size]]
            requests = [request for _, request, _, error in read if error is None]
            answers = enumerate(model.generate(requests, generation, batch_size=batch_size, on_error="record"))
            for where, _, name, error in read:
                i, answer = next(answers) if error is None else (None, Answer(finish_reason="error", error=error))
                failed += answer.error is not None
                error = answer.error and answer.error.replace(f"request {i}", where, 1)  # its place in the file, not in the portion
                row = {"id": name, "text": answer.text, "tokens": answer.tokens, "finish_reason": answer.finish_reason, "error": error}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
    return len(lines) - kept, failed, kept


def finished(target, lines):
    """How many whole answers `target` holds; a line cut off at the end is removed."""
    if not target.exists():
        return 0
    data = target.read_bytes()  # the cut may run through a character
    whole = data[: data.rfind(b"\n") + 1]
    try:
        answers = [json.loads(line) for line in whole.split(b"\n")[:-1]]
        ids = [answer["id"] for answer in answers if answer["finish_reason"]]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{target} holds something else than answers: give another output") from None
    if not START.startswith(data[len(whole) :][: len(START)]):
        raise DataError(f"{target} holds something else than answers: give another output")
    for name, (where, line) in zip(ids, lines, strict=False):
        if name != line_id(line, where):
            raise DataError(f"{target} holds answers to other requests than {where}: give another output, or remove it")
    if len(ids) > len(lines):
        raise DataError(f"{target} holds more answers than there are requests: give another output, or remove it")
    os.truncate(target, len(whole))
    return len(ids)


def line_id(line, where):
    """The request's own id, or its line number."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    name = record.get("id") if isinstance(record, dict) else None
    return where.rsplit(":", 1)[1] if name is None else str(name)


def read_line(line, where, images):
    """(Request or None, id, what is wrong or None)."""
    name = line_id(line, where)
    try:
        dialogue = from_record(json.loads(line), where, images)
        if unknown := [role for role, _ in dialogue.turns if role not in ROLES]:
            raise DataError(f"{where}: a turn is from {unknown[0]!r}; known are {', '.join(ROLES)}")
        if dialogue.marked:
            check_marks(dialogue, len(dialogue.images))
        messages = [{"role": ROLES[role], "content": without_marks(text) if dialogue.marked else text} for role, text in dialogue.turns]
        if messages[-1]["role"] == "assistant" and dialogue.marked:
            messages.pop()
        return Request(messages, list(dialogue.images), name), name, None
    except json.JSONDecodeError as error:
        return None, name, f"{where}: not JSON ({error.msg}). Correct or remove the line"
    except DataError as error:
        return None, name, str(error)
