"""What all configs share: how they are checked, compared and stored as JSON."""

import dataclasses
import json
import shlex
import typing

from omnifusion_jax.errors import ConfigError


def check(condition: bool, message: str):
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def one_of(name: str, value, choices):
    """Raises ConfigError unless the value of the setting `name` is one of the choices."""
    check(value in choices, f"{name} is {value!r}; choose from {', '.join(choices)}")


def same_settings(name: str, ours, theirs, source, but=()):
    """Compares a part's config, `ours`, with that of the checkpoint it comes from, `theirs`.

    Either may be None: the part is not there. Fields named in `but` may differ.

    Raises: ConfigError with all differences.
    """
    check(
        (ours is None) == (theirs is None),
        f"{source} has {'no' if theirs is None else 'a'} {name}, "
        f"the config has {'none' if ours is None else 'one'}",
    )
    wrong = []
    for field in dataclasses.fields(theirs) if theirs else ():
        value = getattr(theirs, field.name)
        if field.name not in but and getattr(ours, field.name, None) != value:
            wrong.append(f"--config.{name}.{field.name}={value}")
    check(
        not wrong,
        f"{source} was made with other settings than the config's {name}. "
        f"To take them over: {shlex.join(wrong)}",
    )


def variant(table, name: str):
    """The row `name` of a config file's table of variants.

    Raises: ConfigError with the names of all variants when there is no such row.
    """
    check(
        name in table,
        f"there is no variant {name!r}; choose from {', '.join(filter(None, table)) or 'none'}, "
        "or give none for the default",
    )
    return table[name]


def to_json(config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)


def from_dict(cls, values):
    """Builds a nested config from what `dataclasses.asdict` gave. Raises ConfigError for unknown fields."""
    cls = cls.of(values) if hasattr(cls, "of") else cls  # `values` say which row of a table this is
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = set(values) - set(fields)
    if unknown:
        raise ConfigError(
            f"{cls.__qualname__} has no field {', '.join(sorted(unknown))}; it has {', '.join(fields)}"
        )
    return cls(**{name: restored(fields[name].type, value) for name, value in values.items()})


def restored(kind, value):
    """A field's value from JSON: a config, a tuple of configs, or anything plain."""
    inside = next((one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)), None)
    if inside is None or value is None:
        return tuples(value)
    if isinstance(value, list | tuple):
        return tuple(from_dict(inside, one) for one in value)
    return from_dict(inside, value)


def tuples(value):
    """Turns lists, which JSON has, into tuples, which configs have, at every depth."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
