"""What the command lines share."""

import dataclasses
import re
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from omnifusion_jax.config import GenerationConfig, MeshConfig
from omnifusion_jax.errors import OmniFusionError
from omnifusion_jax.sharding import make_mesh


def run(main):
    """`absl.app.run`, except that an error raised on purpose is one message on stderr and exit status 1, without a traceback."""

    def guarded(argv):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected {' '.join(argv[1:])}; options start with --")
        try:
            return main(argv)
        except OmniFusionError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    def parse(argv):
        try:
            return flags.FLAGS(argv)
        except (KeyError, OmniFusionError) as error:  # KeyError: config_flags' word for a field that is not there
            sys.exit(f"error: {error.args[0]}")
        except flags.Error as error:  # what a config file raises comes wrapped, with its traceback
            raised = re.findall(r"\w+Error: (.+)", str(error))
            sys.exit(f"error: {raised[-1] if raised else error}\nPass --helpshort for the flags.")

    logging.set_verbosity(logging.WARNING)  # checkpointing would print a page a save
    app.run(guarded, flags_parser=parse)


def define_generation():
    """Flags --generation.FIELD=value for every field of GenerationConfig, and --generation.official for the published recipe to start from.

    Returns a function that gives the GenerationConfig once flags are parsed.
    """
    defaults = {"official": False, **dataclasses.asdict(GenerationConfig())}
    holder = config_flags.DEFINE_config_dict("generation", ConfigDict(defaults))

    def parsed():
        typed = {name: getattr(holder.value, name) for name in defaults if any(re.match(rf"--?(no)?generation\.{name}\b", word) for word in sys.argv)}
        base = GenerationConfig.official() if typed.pop("official", False) else GenerationConfig()
        return dataclasses.replace(base, **typed)

    return parsed


def define_mesh():
    """Flags --mesh.data, --mesh.fsdp and --mesh.tensor.

    Returns a function that gives the mesh once flags are parsed; one device needs none.
    """
    holder = config_flags.DEFINE_config_dict("mesh", ConfigDict({"data": 1, "fsdp": 1, "tensor": 1}))

    def parsed():
        sizes = holder.value.to_dict()
        MeshConfig(**sizes).validate()
        return None if set(sizes.values()) == {1} else make_mesh(**sizes)

    return parsed
