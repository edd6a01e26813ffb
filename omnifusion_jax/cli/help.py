"""What --help prints: a command's flags, and the config fields that are flags too, each with its meaning."""

import dataclasses
import textwrap
import types
import typing

from omnifusion_jax.fields import fields, options, values

WIDTH = 110
COLUMNS = (30, 12, 14)  # of field, type, default; the meaning takes the rest


def page(introduction: str, flags, sections=()) -> str:
    """The whole text.

    Args:
      flags: those of absl.
      sections: each has a `name`, `defaults`, a dataclass every field of which is a flag too, and `choices`,
        as FieldFlags have them.
    """
    lines = [introduction, ""]
    for flag in flags:
        default = f" Default: {flag.default}." if flag.default else ""
        meaning = " ".join(flag.help.split())  # absl breaks lines of its own
        lines.append(row((f"--{flag.name}",), meaning + default))
    for section in sections:
        lines += ["", heading(section.name), "", row(("FIELD", "type", "default"), "")]
        usual = rows(section.defaults)
        lines += usual
        for choice, (path, part) in section.choices().items():
            own = [line for line in rows(part, f"{path}.", but=choice.partition("=")[0]) if line not in usual]
            lines += ["", f"with --{section.name}.{choice}", "", *own] if own else []
    return "\n".join(lines)


def rows(config, under: str = "", but: str = "") -> list[str]:
    """The rows of all fields of a dataclass whose paths begin with `under`, without the field `but`."""
    known, found = fields(config), {under + path: (path, value) for path, value in values(config).items()}
    found.pop(but, None)
    return [
        row((name, spelt(known[path].kind), short(value)), known[path].meaning)
        for name, (path, value) in found.items()  # `known` has fields of parts that are None too
    ]


def heading(section: str) -> str:
    defaults = "; a config has defaults of its own" if section == "config" else ""
    return f"--{section}.FIELD=value, a list in quotes: '[1, 2]'{defaults}"


def row(cells: tuple[str, ...], meaning: str) -> str:
    """Cells in their columns, then the meaning, on as many lines as it needs."""
    widths = COLUMNS[: len(cells)]
    start = "  " + " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)) + " "
    if not meaning:
        return start.rstrip()
    indent = " " * (2 + sum(widths) + len(widths))
    return textwrap.fill(meaning, WIDTH, initial_indent=start, subsequent_indent=indent)


def spelt(kind) -> str:
    """A type, as the user types its values: a list for a tuple, "build" for a part that may be None."""
    names = {types.NoneType: "None", tuple: "list", dict: "dict"}
    found = [typing.get_origin(option) or option for option in options(kind)]
    words = []
    for option in found:
        is_config = dataclasses.is_dataclass(option)
        words.append("build" if is_config else names.get(option) or option.__name__)
    return " | ".join(words)


def short(value, room: int = COLUMNS[2]) -> str:
    """A value as the user would type it, cut if it is too long for its column."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(lists(value))
    return text if len(text) <= room else f"{text[: room - 3]}..."


def lists(value):
    """The value with lists for its tuples, at every depth."""
    return [lists(inner) for inner in value] if isinstance(value, tuple) else value
