"""Flags that override fields of configs: --NAME.FIELD=value."""

import dataclasses
import itertools
import re
import typing
from operator import attrgetter

from absl import flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from omnifusion_jax.config import GenerationConfig, MeshConfig, ModelConfig, TrainConfig
from omnifusion_jax.config import adapter as make_adapter
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.fields import fields, options, read
from omnifusion_jax.models.presets import keep, resolve
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.shipped import load
from omnifusion_jax.tables import ADAPTERS

# A flag defined by this file belongs to the command line that asks for it.
flags.disclaim_key_flags()


class FieldFlags:
    """Flags --NAME.FIELD=value for every field of a dataclass and of the dataclasses in it.

    An entry of a field that is a dict is --NAME.FIELD.KEY=value. Values are checked when flags are parsed,
    and kept in `given`, {path: value}; `over` sets them in a config, through config_flags.
    """

    def __init__(self, name: str, defaults):
        self.name, self.defaults, self.fields, self.given = name, defaults, fields(defaults), {}

    def take(self, argv: list[str]) -> list[str]:
        """Reads the words that are flags of these fields, and returns the others.

        Raises: ConfigError for a value that is missing or of another type than its field's.
        """
        self.given, rest, words = {}, [], iter(argv)
        for word in words:
            match = re.fullmatch(rf"--?(no)?{self.name}\.([\w./]+)(?:=(.*))?", word, re.DOTALL)
            no, path, text = match.groups() if match else (None, None, None)
            kind = path and self.kind(path)
            truth = bool in options(kind)
            misused_no = no and (not truth or text is not None)  # --noFIELD is for truth values alone
            if kind is None or misused_no:
                rest.append(word)
                continue
            name = f"--{self.name}.{path}"
            if text is None:
                text = str(not no) if truth else next(words, None)
            if text is None:
                raise ConfigError(f"{name} has no value: it is written {name}=value")
            try:
                self.given[path] = read(text, kind)
            except ValueError as error:
                raise ConfigError(f"{name}={text}: {error}") from None
        return rest

    def choices(self) -> dict[str, tuple[str, object]]:
        """Values that bring fields of their own: {"FIELD=value": (a path, the defaults of what is there)}."""
        return {}

    def kind(self, path: str):
        """The type of the field at a path; None if there is no such field."""
        if path in self.fields:
            return self.fields[path].kind
        field = self.fields.get(path.partition(".")[0])
        return str | None if field and typing.get_origin(field.kind) is dict else None

    def over(self, config):
        """A copy of a config with the given values.

        Raises: ConfigError for a field of a part that is None.
        """
        entries = {path: value for path, value in self.given.items() if path not in self.fields}  # of dicts
        given = [(path, value) for path, value in self.given.items() if path not in entries]
        given.sort()  # puts a part before its fields
        words = [self.name]
        words += [f"--{self.name}.{indexed(path)}={value}" for path, value in given if plain(value)]
        here = flags.FlagValues()
        try:
            config = config_flags.DEFINE_config_dataclass(self.name, config, flag_values=here, sys_argv=words)
            here(words)
        except ValueError as error:  # a field of a part that is None
            raise ConfigError(str(error)) from None
        for path, value in given:
            if not plain(value):
                config_path.set_value(indexed(path), config.value, value)
        for path, value in entries.items():
            name, _, key = path.partition(".")
            held = dict(getattr(config.value, name))
            if value is None:
                held.pop(key, None)
            else:
                held[key] = value
            setattr(config.value, name, held)
        return config.value


def plain(value) -> bool:
    """Whether config_flags can read a value from text."""
    return value is not None and not isinstance(value, dict)


def indexed(path: str) -> str:
    """A path as config_flags writes it: image.encoders[0].patch for image.encoders.0.patch."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path)


class ConfigFlags(FieldFlags):
    """--config, a name or a file, and --config.FIELD: `value` is a TrainConfig.

    Which fields there are depends on the file, the preset and the kind of adapter that the command line
    names; the order of flags does not matter. `flag`: the name of the flag that is --config otherwise.
    """

    def __init__(self, flag_values=flags.FLAGS, flag: str = "config", meaning: str = ""):
        super().__init__("config", TrainConfig())
        self.source = flags.DEFINE_string(
            flag,
            None,
            f"{meaning}NAME[:VARIANT] of a shipped config, or FILE.py[:VARIANT]: see --help.",
            flag_values,
        )
        self.chosen = {}

    def choices(self):
        return {
            f"{path}={kind}": (path.removesuffix(".kind"), make_adapter(kind))
            for path in KINDS
            for kind in ADAPTERS.names()
        }

    def take(self, argv):
        source = said(argv, self.source.name)
        self.chosen = {path: said(argv, f"config.{path}") for path in ("model.preset", *KINDS)}
        self.fields = fields(self.defaults if source is None else self.begun(load(source)))
        return super().take(argv)

    def begun(self, config: TrainConfig) -> TrainConfig:
        """Sets the preset and the adapters that the command line names.

        They decide which fields there are; the other flags set those.
        """
        preset, *kinds = self.chosen.values()
        config.model.preset = preset or config.model.preset
        config.model = resolve(config.model)
        for path, kind in zip(KINDS, kinds, strict=True):
            if kind is not None:
                part = attrgetter(path.removesuffix(".adapter.kind"))(config)
                old = part.adapter
                part.adapter = make_adapter(kind)
                keep(old, type(old)(), part.adapter)
                part.adapter.kind = kind
        return config

    @property
    def file(self) -> TrainConfig:
        """The config file's TrainConfig, without the changes of the command line, made anew each time."""
        return load(self.source.value)

    @property
    def value(self) -> TrainConfig:
        return self.over(self.begun(self.file))


# The fields that decide which other fields there are
KINDS = tuple(f"model.{name}.adapter.kind" for name in ModelConfig().streams)


def said(argv: list[str], name: str) -> str | None:
    """The value of the last flag --NAME among words; None if there is none."""
    found = None
    for word, following in itertools.zip_longest(argv, argv[1:]):
        match = re.fullmatch(rf"--?{re.escape(name)}(?:=(.*))?", word, re.DOTALL)
        if match:
            found = match[1] if match[1] is not None else following
    return found


class GenerationFlags(FieldFlags):
    """--generation.FIELD, and --generation.official: `value` is a GenerationConfig, with these `defaults`."""

    def __init__(self, flag_values=flags.FLAGS, **defaults):
        super().__init__("generation", GenerationConfig(**defaults))
        self.official = flags.DEFINE_bool(
            "generation.official", False, "Start from the recipe published with OmniFusion-1.1.", flag_values
        )

    @property
    def value(self) -> GenerationConfig:
        start = GenerationConfig.official() if self.official.value else self.defaults
        return dataclasses.replace(start, **self.given)  # which is frozen: config_flags could not set a field


class MeshFlags(FieldFlags):
    """--mesh.data, --mesh.fsdp, --mesh.tensor: `value` is a mesh, or None for one device."""

    def __init__(self):
        super().__init__("mesh", MeshConfig(data=1, fsdp=1, tensor=1))

    @property
    def value(self):
        mesh = self.over(self.defaults)
        mesh.validate()
        sizes = vars(mesh)
        return None if set(sizes.values()) == {1} else make_mesh(**sizes)
