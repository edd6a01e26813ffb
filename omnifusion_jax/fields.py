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


@functools.cache
def fields(cls):
    """{path: Field} of all that can be set in a dataclass, and in the dataclasses in it: optimizer.clip."""
    found, means = {}, meanings(cls)
    for name, kind in hints(cls).items():
        inside = [option for option in options(kind) if dataclasses.is_dataclass(option)]
        if [kind] != inside:
            found[name] = Field(kind, means.get(name, ""))
        for option in inside:
            found |= {f"{name}.{path}": field for path, field in fields(option).items()}
    return found


def hints(cls):
    found = typing.get_type_hints(cls)
    return {field.name: found[field.name] for field in dataclasses.fields(cls)}


def options(kind):
    """The types of a union, or the one there is."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def meanings(cls):
    """{field: its comment}. Empty where the source is not at hand."""
    found = {}
    for base in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # no source, or built in
            continue
        tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT]
        comments = {token.start[0]: token.string.lstrip("# ").rstrip() for token in tokens}
        alone = {token.start[0] for token in tokens if token.line.lstrip().startswith("#")}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                first = node.lineno
                while first - 1 in alone:
                    first -= 1
                lines = [comments[line] for line in range(first, node.end_lineno + 1) if line in comments]
                found[node.target.id] = " ".join(lines)
    return found


def values(config):
    """{path: value} of everything that a nested dataclass holds."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        parts = {f".{path}": v for path, v in values(value).items()} if dataclasses.is_dataclass(value) else {"": value}
        found |= {field.name + path: v for path, v in parts.items()}
    return found


def strays(config):
    """Paths of attributes that were set on a nested dataclass but are no fields of it."""
    known = {field.name for field in dataclasses.fields(config)}
    parts = {name: value for name, value in vars(config).items() if name in known and dataclasses.is_dataclass(value)}
    inside = [f"{name}.{path}" for name, part in parts.items() for path in strays(part)]
    return [name for name in vars(config) if name not in known] + inside


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
EXAMPLES = {int: 1, float: 0.5, bool: True, str: "text", tuple: [1, 2], types.NoneType: None}
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
    if not fits(value, one) or text == "None":
        raise ValueError(f"{spoken(kind)} is expected")
    return value


def fits(value, kind):
    choices, inner = options(kind), typing.get_args(kind)
    if len(choices) > 1:
        return any(fits(value, choice) for choice in choices)
    if typing.get_origin(kind) is tuple:
        each = (inner[0],) * len(value) if isinstance(value, tuple) and inner[-1] is ... else inner
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    return type(value) is kind or (kind is float and type(value) is int)  # in Python True is an int


def spoken(kind):
    """What a type takes, in words."""
    nothing = " or None" if types.NoneType in options(kind) else ""
    one = next(choice for choice in options(kind) if choice is not types.NoneType)
    if dataclasses.is_dataclass(one):
        return "None or build"
    return SPOKEN.get(one, f"a list like {example(one)}") + nothing


def example(kind):
    """A value of a type, for messages."""
    if typing.get_origin(kind) is tuple:
        return [example(inner) for inner in typing.get_args(kind) if inner is not ...]
    return EXAMPLES[options(kind)[0]]
