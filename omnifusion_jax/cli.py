"""What the command lines share."""

import inspect
import os
import re
import sys

from absl import app, flags, logging

from omnifusion_jax.config import GenerationConfig, MeshConfig, TrainConfig
from omnifusion_jax.errors import OmniFusionError
from omnifusion_jax.fields import changed, fields, nearest, read, values
from omnifusion_jax.manual import page, short
from omnifusion_jax.models.presets import resolve
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.shipped import load

flags.disclaim_key_flags()  # a flag defined through this file belongs to the command line that asks for it
HELP = {"--help", "-help", "-h", "-?", "--helpshort"}
MISSING = re.compile(r"flag --(\S+)=None: Flag --\1 must have a value other than None\.")


def run(main, argv=None):
    """`absl.app.run`, except that an error raised on purpose is one line on stderr and exit status 1, without a
    traceback, and that --help ends with 0.
    """

    def guarded(argv):
        try:
            return main(argv)
        except OmniFusionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    def parse(argv):
        module = sys.modules[main.__module__]
        if HELP & set(argv[1:]):
            show(page(inspect.getdoc(module), flags.FLAGS.get_key_flags_for_module(module)))
            sys.exit()
        return parsed(argv, [flag.name for flag in flags.FLAGS.get_key_flags_for_module(module)])

    logging.set_verbosity(logging.WARNING)  # checkpointing would print a page a save
    app.run(guarded, argv, flags_parser=parse)


def show(text):
    try:
        print(text, flush=True)
    except BrokenPipeError:  # whoever reads has read enough: --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parsed(argv, known, flag_values=flags.FLAGS):
    """Takes the flags from `argv`. Exits with one line where one is wrong; those `known` are suggested instead."""
    try:
        rest = flag_values(argv)
    except flags.UnrecognizedFlagError as error:
        sys.exit(f"error: {unknown(error.flagname, known)}")
    except (flags.Error, ValueError) as error:  # ValueError: --noNAME=value
        message = MISSING.sub(r"--\1 is missing; --help says what it is", str(error))
        sys.exit(f"error: {message.removeprefix('flag ')}".replace("\n", ". "))  # one a flag that is missing
    if len(rest) > 1:
        sys.exit(f"error: unexpected {' '.join(rest[1:])}: flags are written --NAME=value; --help lists them")
    return rest


def unknown(name, known):
    """What to say of a flag that is not there: which one is likely meant, or what there is in its place."""
    there = f"there is no flag --{name}; "
    within = lambda section: dict.fromkeys(other.removeprefix(f"{section}.").partition(".")[0] for other in known if other.startswith(f"{section}."))
    if inside := within(name):  # a section
        return there + f"--{name} has the fields {', '.join(inside)}"
    if meant := nearest(name, known):
        return there + f"is --{meant} meant? --help lists all"
    section = name.rpartition(".")[0]
    return there + (f"--{section} has the fields {', '.join(within(section))}" if within(section) else "--help lists those there are")


class Reader(flags.ArgumentParser):
    """Makes the text of a flag a value of a dataclass field."""

    def __init__(self, kind):
        self.kind = kind

    def parse(self, argument):
        return read(argument, self.kind)


class FieldFlag(flags.Flag):
    """--NAME.FIELD: None stands for "not given" until `present` says otherwise."""

    def __init__(self, name, field, default_text):
        self.field, self.default_text = field, default_text
        super().__init__(Reader(field.kind), flags.ArgumentSerializer(), name, None, field.meaning, boolean=field.kind is bool)


class Given:
    """Flags --NAME.FIELD=value for every field of a dataclass and of those in it.

    `value` is, once flags are parsed, start(`given`) with the values set that were given, {path: value}. Where there is no
    `start`, it is `defaults`, from which --help has its defaults too.
    """

    def __init__(self, name, defaults, start=None, flag_values=flags.FLAGS):
        self.start = start or (lambda given: defaults)
        texts = {path: short(value) for path, value in values(defaults).items()}  # not of parts that are None
        self.flags = {path: FieldFlag(f"{name}.{path}", field, texts.get(path)) for path, field in fields(type(defaults)).items()}
        for flag in self.flags.values():
            flags.DEFINE_flag(flag, flag_values)

    @property
    def given(self):
        return {path: flag.value for path, flag in self.flags.items() if flag.present}

    @property
    def value(self):
        return changed(self.start(self.given), self.given)


def define_config(flag_values=flags.FLAGS):
    """The flag --config, a name or a file, and those of its fields: a Given, whose start({}) is what the file says.

    Another model.preset is followed before other fields are set.
    """
    source = flags.DEFINE_string("config", None, "NAME[:VARIANT] of a shipped config, or FILE.py[:VARIANT]: see --help.", flag_values)

    def start(given):
        config = load(source.value)
        config.model.preset = given.get("model.preset", config.model.preset)
        config.model = resolve(config.model)
        return config

    return Given("config", TrainConfig(), start, flag_values)


def define_generation(flag_values=flags.FLAGS):
    """Flags of GenerationConfig, and --generation.official. Returns a function that gives it once flags are parsed."""
    official = flags.DEFINE_bool("generation.official", False, "Start from the recipe published with OmniFusion-1.1.", flag_values)
    start = lambda given: GenerationConfig.official() if official.value else GenerationConfig()
    holder = Given("generation", GenerationConfig(), start, flag_values)
    return lambda: holder.value


def define_mesh(flag_values=flags.FLAGS):
    """Flags --mesh.data, --mesh.fsdp, --mesh.tensor. Returns a function that gives the mesh; one device needs none: None."""
    holder = Given("mesh", MeshConfig(data=1, fsdp=1, tensor=1), flag_values=flag_values)

    def mesh():
        sizes = vars(holder.value)
        holder.value.validate()
        return None if set(sizes.values()) == {1} else make_mesh(**sizes)

    return mesh
