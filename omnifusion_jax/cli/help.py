"""What --help prints: a command's flags, and the fields that are flags too, with type, default and meaning."""

import dataclasses
import textwrap
import types
import typing

from omnifusion_jax.fields import fields, options, values

WIDTH = 110
COLUMNS = (30, 12, 14)  # field, type, default; the meaning has the rest


def page(introduction, flags, sections=()):
    """Args: flags: those of absl; sections: each a `name` and `defaults`, a dataclass of which each field is a flag too."""
    lines = [
        introduction,
        "",
        *(
            row((f"--{flag.name}",), flag.help + (f" Default: {flag.default}." if flag.default else ""))
            for flag in flags
        ),
    ]
    for section in sections:
        known, defaults = (
            fields(section.defaults),
            values(section.defaults),
        )  # the latter not of parts that are None
        rows = [
            row((path, spelt(known[path].kind), short(value)), known[path].meaning)
            for path, value in defaults.items()
        ]
        lines += ["", heading(section.name), "", row(("FIELD", "type", "default"), ""), *rows]
    return "\n".join(lines)


def heading(section):
    defaults = "; a config has defaults of its own" if section == "config" else ""
    return f"--{section}.FIELD=value, a list in quotes: '[1, 2]'{defaults}"


def row(cells, meaning):
    """Cells in their columns, then the meaning, on as many lines as it takes."""
    widths = COLUMNS[: len(cells)]
    start = "  " + " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)) + " "
    if not meaning:
        return start.rstrip()
    return textwrap.fill(
        meaning, WIDTH, initial_indent=start, subsequent_indent=" " * (2 + sum(widths) + len(widths))
    )


def spelt(kind):
    """A type as it is annotated; a tuple is typed as a list, a part that may be missing as "build" or None."""
    names = {types.NoneType: "None", tuple: "list", dict: "dict"}
    found = [typing.get_origin(option) or option for option in options(kind)]
    return " | ".join(
        "build" if dataclasses.is_dataclass(option) else names.get(option) or option.__name__
        for option in found
    )


def short(value, room=COLUMNS[2]):
    """A value as one would type it, cut where it is too long for its column."""
    text = value if isinstance(value, str) and value.isprintable() and value else repr(lists(value))
    return text if len(text) <= room else f"{text[: room - 3]}..."


def lists(value):
    return [lists(inner) for inner in value] if isinstance(value, tuple) else value
