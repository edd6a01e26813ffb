"""Files of a run with a JSON object a line: metrics.jsonl and others."""

import json
from collections.abc import Iterable
from pathlib import Path


def read_rows(path: Path) -> list[dict]:
    """The lines as dicts, without one that was cut off; [] when there is no file."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def write_rows(path: Path, rows: Iterable[dict]):
    """Writes the whole file anew; it is the old one or the new one, whenever the process ends."""
    beside = path.with_suffix(".new")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
