"""Configs over which the command line has been laid: --NAME.FIELD=value."""

import dataclasses
import re

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from omnifusion_jax.config import GenerationConfig, MeshConfig, TrainConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.fields import fields, read
from omnifusion_jax.models.presets import resolve
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.shipped import load

flags.disclaim_key_flags()  # a flag defined through this file belongs to the command line that asks for it


class FieldFlags:
    """Flags --NAME.FIELD=value for every field of a dataclass and of those in it.

    What is typed is checked when flags are parsed, and is {path: value} in `given`; config_flags sets it.
    """

    def __init__(self, name, defaults):
        self.name, self.defaults, self.fields, self.given = name, defaults, fields(type(defaults)), {}

    def take(self, argv):
        """Reads the words that are flags of these fields, and returns the others. Raises ConfigError."""
        self.given, rest, words = {}, [], iter(argv)
        for word in words:
            match = re.fullmatch(rf"--?(no)?{self.name}\.([\w.]+)(?:=(.*))?", word, re.DOTALL)
            no, path, text = match.groups() if match else (None, None, None)
            if path not in self.fields or (no and (self.fields[path].kind is not bool or text is not None)):
                rest.append(word)
                continue
            name, kind = f"--{self.name}.{path}", self.fields[path].kind
            if text is None:
                text = str(not no) if kind is bool else next(words, None)
            if text is None:
                raise ConfigError(f"{name} has no value: it is written {name}=value")
            try:
                self.given[path] = read(text, kind)
            except ValueError as error:
                raise ConfigError(f"{name}={text}: {error}") from None
        return rest

    def over(self, config, define=config_flags.DEFINE_config_dataclass):
        """A config with what was given: a copy of a dataclass, or the ConfigDict itself."""
        given = sorted(self.given.items())  # a part before its fields
        words = [self.name, *(f"--{self.name}.{path}={value}" for path, value in given if value is not None)]
        here = flags.FlagValues()
        try:
            config = define(self.name, config, flag_values=here, sys_argv=words)
            here(words)
        except ValueError as error:  # a field of a part that is not there
            raise ConfigError(str(error)) from None
        for path, value in given:
            if value is None:  # which config_flags does not read
                config_path.set_value(path, config.value, None)
        return config.value


class ConfigFlags(FieldFlags):
    """--config, a name or a file, and --config.FIELD: `value` is a TrainConfig."""

    def __init__(self, flag_values=flags.FLAGS):
        super().__init__("config", TrainConfig())
        self.source = flags.DEFINE_string("config", None, "NAME[:VARIANT] of a shipped config, or FILE.py[:VARIANT]: see --help.", flag_values)

    @property
    def file(self):
        """What the file says, before the command line changes it: a TrainConfig of one's own each time."""
        return load(self.source.value)

    @property
    def value(self):
        config = self.over(self.file)
        config.model = resolve(config.model, self.given)
        return config


class GenerationFlags(FieldFlags):
    """--generation.FIELD, and --generation.official: `value` is a GenerationConfig."""

    def __init__(self, flag_values=flags.FLAGS):
        super().__init__("generation", GenerationConfig())
        self.official = flags.DEFINE_bool("generation.official", False, "Start from the recipe published with OmniFusion-1.1.", flag_values)

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
