"""Fields of nested dataclasses by dotted path: what they take, what they mean, how text becomes their value.

What a field means is the comment beside it, after whole lines of comment above it: it is read from the source, and said once.
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
    kind: object  # the annotation: float | None
    meaning: str


def fields(config):
    """{path: Field} of all that can be set in a dataclass, and in the dataclasses in it: optimizer.clip, or of one in a
    tuple image.encoders.0.patch. Of a part that is None the fields that it would have."""
    found, means = {}, meanings(type(config))
    for name, kind in hints(type(config)).items():
        inside = nested(getattr(config, name), kind)
        if not inside or types.NoneType in options(kind):
            found[name] = Field(kind, means.get(name, ""))
        for path, part in inside.items():
            found |= {f"{name}{path}.{rest}": field for rest, field in fields(part).items()}
    return found


def nested(value, kind=object):
    """{path within a field: dataclass} of what a field holds: "" for the value itself, ".0" and so on for those in a tuple."""
    if dataclasses.is_dataclass(value):
        return {"": value}
    if isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
        return {f".{i}": one for i, one in enumerate(value)}
    option = next((option for option in options(kind) if dataclasses.is_dataclass(option)), None)
    return {"": option()} if value is None and option else {}


def hints(cls):
    found = typing.get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def options(kind):
    """The types of a union, or the one there is."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


@functools.cache
def meanings(cls):
    """{field: its comment}. Empty where the source is not at hand."""
    found = {}
    for base in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # no source, or built in
            continue
        tokens = [
            token
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        ]
        comments = {token.start[0]: token.string.lstrip("# ").rstrip() for token in tokens}
        alone = {token.start[0] for token in tokens if token.line.lstrip().startswith("#")}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                first = node.lineno
                while first - 1 in alone:
                    first -= 1
                lines = [comments[line] for line in range(first, node.end_lineno + 1) if line in comments]
                found[node.target.id] = " ".join(lines) or found.get(
                    node.target.id, ""
                )  # with another default it means the same
    return found


def values(config):
    """{path: value} of everything that a nested dataclass holds."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inside = nested(value)
        found |= {
            f"{field.name}{path}.{rest}": v
            for path, part in inside.items()
            for rest, v in values(part).items()
        }
        if not inside:
            found[field.name] = value
    return found


def strays(config):
    """Paths of attributes that were set on a nested dataclass but are no fields of it."""
    known = {field.name for field in dataclasses.fields(config)}
    found = [name for name in vars(config) if name not in known]
    for name in known & vars(config).keys():
        found += [
            f"{name}{path}.{rest}"
            for path, part in nested(vars(config)[name]).items()
            for rest in strays(part)
        ]
    return found


def nearest(path, known):
    """The known path that `path` is likeliest to mean, by its last word first; None where none is like it."""
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


def read(text, kind):
    """The value of type `kind` that is written as `text`.

    "None" is None where the annotation has `| None`, and so is nothing at all where it is `str | None`. Tuples are
    written as Python lists: '["\\n", ":"]'. A part that may be None is "build", which config_flags does, or None.
    Raises ValueError that says what is expected.
    """
    choices = options(kind)
    if types.NoneType in choices and (text == "None" or (text == "" and str in choices)):
        return None
    (one,) = (choice for choice in choices if choice is not types.NoneType)
    if dataclasses.is_dataclass(one) and text == "build":
        return text
    try:
        value = READERS.get(one, lambda text: tuples(ast.literal_eval(text)))(text)
    except (ValueError, SyntaxError, TypeError, KeyError):
        raise ValueError(f"{spoken(kind)} is expected") from None
    if not is_a(value, one) or text == "None":
        raise ValueError(f"{spoken(kind)} is expected")
    return value


def is_a(value, kind):
    choices, inner = options(kind), typing.get_args(kind)
    if len(choices) > 1:
        return any(is_a(value, choice) for choice in choices)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(
            is_a(name, inner[0]) and is_a(one, inner[1]) for name, one in value.items()
        )
    if typing.get_origin(kind) is tuple:
        each = (inner[0],) * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(is_a, value, each))
    return type(value) is kind or (kind is float and type(value) is int)  # in Python True is an int


def spoken(kind):
    """What a type takes, in words."""
    nothing = " or None" if types.NoneType in options(kind) else ""
    one = next(choice for choice in options(kind) if choice is not types.NoneType)
    if dataclasses.is_dataclass(one):
        return "None or build"
    return (
        SPOKEN.get(one, f"{'text like' if typing.get_origin(one) is dict else 'a list like'} {example(one)}")
        + nothing
    )


def example(kind):
    """A value of a type, for messages."""
    if typing.get_origin(kind) is tuple:
        return [example(inner) for inner in typing.get_args(kind) if inner is not ...]
    if typing.get_origin(kind) is dict:
        return EXAMPLES[dict]
    return EXAMPLES[options(kind)[0]]
