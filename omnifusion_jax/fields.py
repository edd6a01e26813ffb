"""Fields of nested dataclasses by dotted path: their types, their meanings, and how text becomes their value.

The meaning of a field is written once, in the source: it is the lines of comment directly above the field,
followed by the comment beside it.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import textwrap
import tokenize
import types
import typing

from omnifusion_jax.config import tuples


class Field(typing.NamedTuple):
    """A field's type and meaning."""

    kind: object  # the annotation: float | None
    meaning: str


def fields(config) -> dict[str, Field]:
    """The fields that can be set in a dataclass object and in the dataclasses in it, by path.

    A path is optimizer.clip, or image.encoders.0.patch for a dataclass in a tuple. A part that is None has
    the fields that it would have if it were there.
    """
    found, means = {}, meanings(type(config))
    for name, kind in hints(type(config)).items():
        inside = nested(getattr(config, name), kind)
        if not inside or types.NoneType in options(kind):
            found[name] = Field(kind, means.get(name, ""))
        for path, part in inside.items():
            found |= {f"{name}{path}.{rest}": field for rest, field in fields(part).items()}
    return found


def nested(value, kind=object) -> dict:
    """The dataclass objects that a field holds, by their path within it.

    The path is "" for the value itself, ".0" and so on for those in a tuple. In place of None stands a
    default object of the dataclass in `kind`, the field's annotation, if there is one.
    """
    if dataclasses.is_dataclass(value):
        return {"": value}
    if isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
        return {f".{i}": one for i, one in enumerate(value)}
    option = next((option for option in options(kind) if dataclasses.is_dataclass(option)), None)
    return {"": option()} if value is None and option else {}


def hints(cls) -> dict:
    """{field: its annotation}"""
    found = typing.get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def options(kind):
    """The types of a union; any other type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


@functools.cache
def meanings(cls) -> dict[str, str]:
    """{field: its comments}, of a dataclass and its bases; without those whose source is not available."""
    found = {}
    for base in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # no source, or built in
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        tokens = [token for token in tokens if token.type == tokenize.COMMENT]
        comments = {token.start[0]: token.string.lstrip("# ").rstrip() for token in tokens}
        alone = {token.start[0] for token in tokens if token.line.lstrip().startswith("#")}
        for node in ast.parse(source).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            name = node.target.id
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [comments[line] for line in range(first, node.end_lineno + 1) if line in comments]
            # a field without a comment only has another default, and means the same as in the base
            found[name] = " ".join(lines) or found.get(name, "")
    return found


def values(config) -> dict:
    """{path: value} of everything that a nested dataclass object holds."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inside = nested(value)
        for path, part in inside.items():
            found |= {f"{field.name}{path}.{rest}": v for rest, v in values(part).items()}
        if not inside:
            found[field.name] = value
    return found


def differences(ours, theirs) -> dict[str, tuple]:
    """{path: (our value, their value)} where two dataclass objects differ; None for what one lacks."""
    ours, theirs = values(ours), values(theirs)
    nothing = object()
    unlike = lambda path: ours.get(path, nothing) != theirs.get(path, nothing)
    return {path: (ours.get(path), theirs.get(path)) for path in {**ours, **theirs} if unlike(path)}


def strays(config) -> list[str]:
    """Paths of attributes that were set on a nested dataclass object but are not fields of it."""
    known = {field.name for field in dataclasses.fields(config)}
    found = [name for name in vars(config) if name not in known]
    for name in known & vars(config).keys():
        for path, part in nested(vars(config)[name]).items():
            found += [f"{name}{path}.{rest}" for rest in strays(part)]
    return found


def nearest(path: str, known) -> str | None:
    """The known path that `path` most likely means, judged by its last word first; None if none is close."""
    leaf = path.rpartition(".")[2]
    like = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
    score = lambda other: (like(leaf, other.rpartition(".")[2]), like(path, other))
    best = max(known, key=score, default=None)
    return best if best and score(best)[0] >= 0.7 else None


# --- from text


TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
READERS = {int: int, float: float, bool: lambda text: TRUTH[text.lower()], str: lambda text: text}
EXAMPLES = {
    int: 1,
    float: 0.5,
    bool: True,
    str: "text",
    tuple: [1, 2],
    dict: {"name": "text"},
    types.NoneType: None,
}
SPOKEN = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def read(text: str, kind):
    """The value of type `kind` that is written as `text`.

    "None" gives None if the annotation has `| None`; so does an empty text if it is `str | None`. Tuples are
    written as Python lists: '["\\n", ":"]'. A part that may be None is given as None or as "build", which is
    returned as it is: config_flags builds the part.

    Raises: ValueError that says what is expected.
    """
    choices = options(kind)
    if types.NoneType in choices and (text == "None" or (text == "" and str in choices)):
        return None
    for one in choices:
        if dataclasses.is_dataclass(one) and text == "build":
            return text
        try:
            value = READERS.get(one, lambda text: tuples(ast.literal_eval(text)))(text)
        except (ValueError, SyntaxError, TypeError, KeyError):
            continue
        if is_a(value, one) and text != "None":
            return value
    raise ValueError(f"{spoken(kind)} is expected")


def is_a(value, kind) -> bool:
    """Whether a value has the type `kind`, at every depth."""
    choices, inner = options(kind), typing.get_args(kind)
    if len(choices) > 1:
        return any(is_a(value, choice) for choice in choices)
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            return False
        return all(is_a(name, inner[0]) and is_a(one, inner[1]) for name, one in value.items())
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        each = (inner[0],) * len(value) if inner[-1] is ... else inner
        return len(value) == len(each) and all(map(is_a, value, each))
    # not isinstance: in Python True is an int
    return type(value) is kind or (kind is float and type(value) is int)


def spoken(kind) -> str:
    """The values of a type, in words, for messages."""
    nothing = " or None" if types.NoneType in options(kind) else ""
    one = next(choice for choice in options(kind) if choice is not types.NoneType)
    if dataclasses.is_dataclass(one):
        return "None or build"
    shape = "text like" if typing.get_origin(one) is dict else "a list like"
    return SPOKEN.get(one, f"{shape} {example(one)}") + nothing


def example(kind):
    """A value of a type, for messages."""
    if typing.get_origin(kind) is tuple:
        return [example(inner) for inner in typing.get_args(kind) if inner is not ...]
    if typing.get_origin(kind) is dict:
        return EXAMPLES[dict]
    return EXAMPLES[options(kind)[0]]
