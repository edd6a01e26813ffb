"""Settings in JSON files, and a check that their values are supported."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.paths import located


def read_json(path: str | Path) -> dict:
    """The object that a JSON file holds.

    Raises:
      CheckpointError: the file is not valid JSON, or does not hold an object.
    """
    try:
        values = json.loads(located(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error!s:.200})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def write_json(path: str | Path, values):
    located(path).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def section(settings: dict, name: str, where: str | Path) -> dict:
    """The settings within settings; {} where there are none or null.

    Raises CheckpointError if they are anything else but a JSON object.
    """
    found = settings.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: {name} is {found!r:.100}, not an object")
    return found


def require(settings: Mapping, allowed: Mapping[str, Collection], where: str | Path):
    """Refuses settings with a value that is not in `allowed[setting]`. A setting that is absent passes.

    Raises:
      CheckpointError: names every such setting, and `where` they were read.
    """
    wrong = [key for key, values in allowed.items() if key in settings and settings[key] not in values]
    if wrong:
        reasons = (
            f"{key} is {settings[key]!r:.200}, supported is {' or '.join(map(repr, allowed[key]))}"
            for key in wrong
        )
        raise CheckpointError(f"{where}: {'; '.join(reasons)}")
