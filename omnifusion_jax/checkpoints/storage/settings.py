"""Settings in JSON files, and which of their values are supported."""

import json
from pathlib import Path

from omnifusion_jax.errors import CheckpointError


def read_json(path) -> dict:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error!s:.200})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def write_json(path, values):
    Path(path).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require(settings, allowed, where):
    """Raises CheckpointError naming every setting that has a value not in `allowed[setting]`; one that is not there passes."""
    wrong = [key for key, values in allowed.items() if key in settings and settings[key] not in values]
    if wrong:
        reasons = (
            f"{key} is {settings[key]!r:.200}, supported is {' or '.join(map(repr, allowed[key]))}"
            for key in wrong
        )
        raise CheckpointError(f"{where}: {'; '.join(reasons)}")
