"""Configs over which the command line has been laid: --NAME.FIELD=value."""

import dataclasses
import itertools
import re
import typing
from operator import attrgetter

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from omnifusion_jax.config import GenerationConfig, MeshConfig, ModelConfig, TrainConfig
from omnifusion_jax.config import adapter as make_adapter
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.fields import fields, read
from omnifusion_jax.models.presets import keep, resolve
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.shipped import load

flags.disclaim_key_flags()  # a flag defined through this file belongs to the command line that asks for it


class FieldFlags:
    """Flags --NAME.FIELD=value for every field of a dataclass and of those in it; --NAME.FIELD.KEY=value for what a dict holds.

    What is typed is checked when flags are parsed, and is {path: value} in `given`; config_flags sets it.
    """

    def __init__(self, name, defaults):
        self.name, self.defaults, self.fields, self.given = name, defaults, fields(defaults), {}

    def take(self, argv):
        """Reads the words that are flags of these fields, and returns the others. Raises ConfigError."""
        self.given, rest, words = {}, [], iter(argv)
        for word in words:
            match = re.fullmatch(rf"--?(no)?{self.name}\.([\w./]+)(?:=(.*))?", word, re.DOTALL)
            no, path, text = match.groups() if match else (None, None, None)
            kind = path and self.kind(path)
            if kind is None or (no and (kind is not bool or text is not None)):
                rest.append(word)
                continue
            name = f"--{self.name}.{path}"
            if text is None:
                text = str(not no) if kind is bool else next(words, None)
            if text is None:
                raise ConfigError(f"{name} has no value: it is written {name}=value")
            try:
                self.given[path] = read(text, kind)
            except ValueError as error:
                raise ConfigError(f"{name}={text}: {error}") from None
        return rest

    def kind(self, path):
        """What the field at a path takes; None where there is none."""
        if path in self.fields:
            return self.fields[path].kind
        field = self.fields.get(path.partition(".")[0])
        return str | None if field and typing.get_origin(field.kind) is dict else None

    def over(self, config, define=config_flags.DEFINE_config_dataclass):
        """A config with what was given: a copy of a dataclass, or the ConfigDict itself."""
        entries = {path: value for path, value in self.given.items() if path not in self.fields}  # of dicts
        given = sorted(
            (path, value) for path, value in self.given.items() if path not in entries
        )  # a part before its fields
        words = [
            self.name,
            *(f"--{self.name}.{indexed(path)}={value}" for path, value in given if plain(value)),
        ]
        here = flags.FlagValues()
        try:
            config = define(self.name, config, flag_values=here, sys_argv=words)
            here(words)
        except ValueError as error:  # a field of a part that is not there
            raise ConfigError(str(error)) from None
        for path, value in given:
            if not plain(value):  # which config_flags does not read
                config_path.set_value(indexed(path), config.value, value)
        for path, value in entries.items():
            name, _, key = path.partition(".")
            held = getattr(config.value, name)
            setattr(
                config.value,
                name,
                {**held, key: value} if value is not None else {k: v for k, v in held.items() if k != key},
            )
        return config.value


def plain(value):
    return value is not None and not isinstance(value, dict)


def indexed(path):
    """image.encoders.0.patch as config_flags has it: image.encoders[0].patch."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", path)


class ConfigFlags(FieldFlags):
    """--config, a name or a file, and --config.FIELD: `value` is a TrainConfig.

    Which fields there are depends on the file, on the preset and on the kind of adapter that the command line names, in
    whatever order.
    """

    def __init__(self, flag_values=flags.FLAGS):
        super().__init__("config", TrainConfig())
        self.source = flags.DEFINE_string(
            "config",
            None,
            "NAME[:VARIANT] of a shipped config, or FILE.py[:VARIANT]: see --help.",
            flag_values,
        )
        self.choices = {}

    def take(self, argv):
        source = said(argv, "config")
        self.choices = {path: said(argv, f"config.{path}") for path in ("model.preset", *KINDS)}
        self.fields = fields(self.defaults if source is None else self.begun(load(source)))
        return super().take(argv)

    def begun(self, config):
        """A config with the preset and the kinds that the command line names, whose fields the other flags are of."""
        preset, *kinds = self.choices.values()
        config.model.preset = preset or config.model.preset
        config.model = resolve(config.model)
        for path, kind in zip(KINDS, kinds, strict=True):
            if kind is not None:
                part = attrgetter(path.removesuffix(".adapter.kind"))(config)
                old, part.adapter = part.adapter, make_adapter(kind)
                keep(old, type(old)(), part.adapter)
                part.adapter.kind = kind
        return config

    @property
    def file(self):
        """What the file says, before the command line changes it: a TrainConfig of one's own each time."""
        return load(self.source.value)

    @property
    def value(self):
        return self.over(self.begun(self.file))


# What decides which other fields there are
KINDS = tuple(f"model.{name}.adapter.kind" for name in ModelConfig().streams)


def said(argv, name):
    """The value of the last flag --NAME among words; None where there is none."""
    found = None
    for word, following in itertools.zip_longest(argv, argv[1:]):
        if match := re.fullmatch(rf"--?{re.escape(name)}(?:=(.*))?", word, re.DOTALL):
            found = match[1] if match[1] is not None else following
    return found


class GenerationFlags(FieldFlags):
    """--generation.FIELD, and --generation.official: `value` is a GenerationConfig."""

    def __init__(self, flag_values=flags.FLAGS):
        super().__init__("generation", GenerationConfig())
        self.official = flags.DEFINE_bool(
            "generation.official", False, "Start from the recipe published with OmniFusion-1.1.", flag_values
        )

    @property
    def value(self):
        start = GenerationConfig.official() if self.official.value else self.defaults
        settings = ConfigDict(dataclasses.asdict(start))  # for it is frozen itself
        return GenerationConfig(**self.over(settings, config_flags.DEFINE_config_dict))


class MeshFlags(FieldFlags):
    """--mesh.data, --mesh.fsdp, --mesh.tensor: `value` is the mesh; one device needs none: None."""

    def __init__(self):
        super().__init__("mesh", MeshConfig(data=1, fsdp=1, tensor=1))

    @property
    def value(self):
        mesh = self.over(self.defaults)
        mesh.validate()
        sizes = vars(mesh)
        return None if set(sizes.values()) == {1} else make_mesh(**sizes)
