"""Which parameters are trained, and how fast: a table of regex and learning-rate factor."""

import re

from omnifusion_jax.errors import ConfigError


def factor(table, path):
    """The learning-rate factor of the parameter at `path`, None when it is frozen. Raises ConfigError unless exactly one row matches."""
    hits = [value for pattern, value in table if re.fullmatch(pattern, path)]
    if len(hits) != 1:
        raise ConfigError(f"{path}: {len(hits)} rows of train_parts match, exactly one must (None freezes)")
    return hits[0]


def split(table, arrays):
    """(trained, frozen), two dicts by path. Raises ConfigError for a row that matches nothing or a table that trains nothing."""
    factors = {path: factor(table, path) for path in arrays}
    for pattern, _ in table:
        if not any(re.fullmatch(pattern, path) for path in arrays):
            raise ConfigError(f"train_parts: no parameter matches {pattern!r}")
    trained = {path: a for path, a in arrays.items() if factors[path] is not None}
    if not trained:
        raise ConfigError("train_parts freezes everything")
    return trained, {path: a for path, a in arrays.items() if factors[path] is None}
