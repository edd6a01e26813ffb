"""What all configs share: how they are checked, compared, and kept as JSON."""

import dataclasses
import json
import shlex
import typing

from omnifusion_jax.errors import ConfigError


def check(condition, message):
    if not condition:
        raise ConfigError(message)


def one_of(name, value, choices):
    check(value in choices, f"{name} is {value!r}; choose from {', '.join(choices)}")


def same_settings(name, ours, theirs, source, but=()):
    """Compares a part's config with that of the checkpoint it comes from, except for the fields `but`. Raises ConfigError with all differences."""
    check(
        (ours is None) == (theirs is None),
        f"{source} has {'no' if theirs is None else 'a'} {name}, the config has {'none' if ours is None else 'one'}",
    )
    fields = (
        [f.name for f in dataclasses.fields(theirs) if f.name not in but] if theirs else ()
    )  # ours may have others
    wrong = [
        f"--config.{name}.{f}={getattr(theirs, f)}"
        for f in fields
        if getattr(ours, f, None) != getattr(theirs, f)
    ]
    check(
        not wrong,
        f"{source} was made with other settings than the config's {name}. To take them over: {shlex.join(wrong)}",
    )


def variant(table, name):
    """The row of a config file's variants. Raises ConfigError naming those there are."""
    check(
        name in table,
        f"there is no variant {name!r}; choose from {', '.join(filter(None, table)) or 'none'}, or give none for the default",
    )
    return table[name]


def to_json(config):
    return json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False)


def from_dict(cls, values):
    """Builds a (nested) config from what `dataclasses.asdict` gave. Raises ConfigError on unknown fields."""
    cls = cls.of(values) if hasattr(cls, "of") else cls  # of a table's rows
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := set(values) - set(fields):
        raise ConfigError(
            f"{cls.__qualname__} has no field {', '.join(sorted(unknown))}; it has {', '.join(fields)}"
        )
    return cls(**{name: restored(fields[name].type, value) for name, value in values.items()})


def restored(kind, value):
    """What JSON holds as a field's value: a config, a tuple of them, or anything plain."""
    inside = next((one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)), None)
    if inside is None or value is None:
        return tuples(value)
    return (
        tuple(from_dict(inside, one) for one in value)
        if isinstance(value, list | tuple)
        else from_dict(inside, value)
    )


def tuples(value):
    """JSON has lists where configs have tuples."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
