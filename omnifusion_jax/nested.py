"""Nested dicts, and the same by path."""

from collections.abc import Mapping
from typing import Any


def flat(value: Any, separator: str = ".", path: str = "") -> dict:
    """{path: leaf} of nested dicts: {"a": {"b": 1}} to {"a.b": 1}. In a list of dicts, numbers are names."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    found = {}
    for name, inner in value.items():
        found |= flat(inner, separator, f"{path}{separator}{name}" if path else str(name))
    return found


def nested(leaves: Mapping[str, Any], separator: str = ".") -> dict:
    """What `flat` was made from, where that had no lists: {"a.b": 1} to {"a": {"b": 1}}."""
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(separator)
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[name] = leaf
    return tree
