"""Which parameters are trained, and how fast: a table of (regex, learning-rate factor)."""

import re

from omnifusion_jax.errors import ConfigError


def factor(table, path: str) -> float | None:
    """The learning-rate factor of the parameter at `path`; None when it is frozen.

    Raises: ConfigError unless exactly one row of the table matches.
    """
    hits = [value for pattern, value in table if re.fullmatch(pattern, path)]
    if len(hits) != 1:
        raise ConfigError(f"{path}: {len(hits)} rows of train_parts match, exactly one must (None freezes)")
    return hits[0]


def split(table, arrays: dict) -> tuple[dict, dict]:
    """Splits {path: array} into two such dicts, (trained, frozen).

    Raises: ConfigError for a row that matches nothing, a table that trains nothing, or what `factor` refuses.
    """
    factors = {path: factor(table, path) for path in arrays}
    for pattern, _ in table:
        if not any(re.fullmatch(pattern, path) for path in arrays):
            raise ConfigError(f"train_parts: no parameter matches {pattern!r}")
    trained = {path: a for path, a in arrays.items() if factors[path] is not None}
    if not trained:
        raise ConfigError("train_parts freezes everything")
    frozen = {path: a for path, a in arrays.items() if factors[path] is None}
    return trained, frozen
