"""Rows of a table as records of dialogues, which `data.dialogues` reads."""

import json

from omnifusion_jax.data.dialogues import FORMS
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES

TURNS = tuple(form for form, _, _ in FORMS)
TEXTS = "texts"  # a column of {"user", "assistant"}, as HuggingFaceM4/the_cauldron has it
# columns of a question and two answers, as openbmb/RLAIF-V-Dataset has them
PAIR = ("question", "chosen", "rejected")
PACKED = "text"  # a column of the same as JSON, as HaoyeZhang/RLHF-V-Dataset has it


def chosen(names: list[str]) -> list[str]:
    """The columns that hold dialogues: turns, media, `id`.

    Raises:
      DataError: none holds turns, or two have one name.
    """
    keys = {key for stream in MODALITIES.names() for key in MODALITIES[stream].keys}
    turns = [name for name in names if name in TURNS]
    if set(PAIR[1:]) <= set(names):
        turns += [name for name in names if name in PAIR]
    turns = turns or [name for name in names if name == TEXTS] or [name for name in names if name == PACKED]
    if not turns:
        known = ", ".join(map(repr, (*TURNS, TEXTS, *PAIR, PACKED)))
        raise DataError(f"there is no column {known}, only {', '.join(names) or 'none'}. Rename one", "form")
    wanted = [name for name in names if name in {"id", *keys, *turns}]
    if len(set(wanted)) < len(wanted):
        raise DataError(f"several columns have one name: {', '.join(wanted)}. Rename or drop one", "form")
    return wanted


def record_of(row: dict) -> dict:
    """The record that was written as a row. Raises DataError."""
    record = without_nulls(row)
    for form in (*TURNS, TEXTS):
        if isinstance(record.get(form), dict):
            record[form] = as_list(record[form], form)
    if TEXTS in record:
        record["messages"] = messages_of(record.pop(TEXTS))
    if PACKED in record:
        record |= unpacked(record.pop(PACKED))
    return record


def unpacked(text):
    """The question and the answers that a column holds as JSON."""
    try:
        found = json.loads(text)
    except (ValueError, TypeError):
        found = None
    if not (isinstance(found, dict) and found.keys() >= set(PAIR)):
        raise DataError(f"{PACKED!r} is not JSON with {', '.join(PAIR)}", "form")
    return {name: found[name] for name in PAIR}


def without_nulls(value):
    """The value without what is null in its structs: a table has every field in every row.

    A picture, {"bytes", "path"}, keeps both.
    """
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if isinstance(value, dict) and not {"bytes", "path"} <= value.keys():
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


def as_list(columns, form):
    """[{...}, ...] of {"from": [...], "value": [...]}, as `datasets` stores a Sequence of dictionaries."""
    try:
        return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
    except (TypeError, ValueError):
        raise DataError(f"{form!r} is neither a list of turns nor lists of one length", "form") from None


def messages_of(texts):
    """{"user", "assistant"} by {"user", "assistant"} as messages, before which all pictures stand."""
    if not (isinstance(texts, list) and all(isinstance(pair, dict) for pair in texts)):
        raise DataError(f'{TEXTS!r} is not a list of {{"user", "assistant"}}', "form")
    return [{"role": role, "content": pair.get(role)} for pair in texts for role in ("user", "assistant")]
