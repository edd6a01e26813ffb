"""Config files: those that come with the package by name, from anywhere; the user's own by path.

As a package this module is their folder, `configs/` beside the package in a checkout and in the package in a wheel, so that
`from omnifusion_jax.shipped import sft` works in both.
"""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path

from omnifusion_jax.config import TrainConfig
from omnifusion_jax.errors import ConfigError, OmniFusionError
from omnifusion_jax.fields import fields, nearest, strays

HERE = Path(__file__).parent
FOLDER = next(
    (folder for folder in (HERE / "configs", HERE.parent / "configs") if folder.is_dir()), HERE / "configs"
)
__path__ = [str(FOLDER)]


def names():
    """Of the shipped configs: pretrain, report/table4, ..."""
    files = [file.relative_to(FOLDER).with_suffix("") for file in FOLDER.rglob("*.py")]
    return sorted(file.as_posix() for file in files if file.name != "__init__")


def module(name):
    """The module of a config file: a shipped one by name, one that ends in .py by path."""
    there = f"shipped with the package are {', '.join(names())}; your own file is given by its path, which ends in .py"
    if not name.endswith(".py"):
        if name not in names():
            raise ConfigError(f"there is no config {name!r}: {there}")
        return importlib.import_module(f"{__name__}.{name.replace('/', '.')}")
    file = Path(name).expanduser()
    if not file.is_file():
        raise ConfigError(f"{name} does not exist: {there}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # where dataclasses of its own look up their types
    spec.loader.exec_module(found)
    return found


def load(source):
    """The config that NAME[:VARIANT] or FILE.py[:VARIANT] stands for.

    Raises ConfigError for an unknown name or variant, for whatever goes wrong in the file, and for attributes that
    are no fields.
    """
    name, colon, variant = source.partition(":")
    try:
        found = module(name).get_config(*[variant][: len(colon)])
    except OmniFusionError:
        raise
    except Exception as error:  # a user's own code: which line is what counts
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == Path(name).expanduser().absolute()
        ]
        where = (
            f", line {getattr(error, 'lineno', None) or lines[-1]}"
            if lines or isinstance(error, SyntaxError)
            else ""
        )
        raise ConfigError(f"{name}{where}: {type(error).__name__}: {error}") from error
    if not isinstance(found, TrainConfig):
        raise ConfigError(f"{name}: get_config gives {type(found).__name__}, a TrainConfig is expected")
    for path in strays(found):
        meant = nearest(path, fields(found))
        raise ConfigError(
            f"{name} sets {path}, which is no field of TrainConfig"
            + (f": is {meant} meant?" if meant else "")
        )
    return found
