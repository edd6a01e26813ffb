"""Config files: those that come with the package, by name; the user's own, by path.

This module is also a package whose folder is `configs/`, which is beside omnifusion_jax in a checkout and
inside it in a wheel. So `from omnifusion_jax.shipped import sft` works in both.
"""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path

import cloudpickle

from omnifusion_jax.config import TrainConfig
from omnifusion_jax.errors import ConfigError, OmniFusionError
from omnifusion_jax.fields import fields, nearest, strays

HERE = Path(__file__).parent
FOLDERS = (HERE / "configs", HERE.parent / "configs")
FOLDER = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])
__path__ = [str(FOLDER)]


def names() -> list[str]:
    """The names of the shipped configs: pretrain, report/table4, ..."""
    files = [file.relative_to(FOLDER).with_suffix("") for file in FOLDER.rglob("*.py")]
    return sorted(file.as_posix() for file in files if file.name != "__init__")


def module(name: str):
    """The module of a config file: by path if `name` ends in .py, else a shipped one by name."""
    there = (
        f"shipped with the package are {', '.join(names())}; "
        "your own file is given by its path, which ends in .py"
    )
    if not name.endswith(".py"):
        if name not in names():
            raise ConfigError(f"there is no config {name!r}: {there}")
        return importlib.import_module(f"{__name__}.{name.replace('/', '.')}")
    file = Path(name).expanduser()
    if not file.is_file():
        raise ConfigError(f"{name} does not exist: {there}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses in the file look up their types there
    # worker processes cannot import it: what it defines, such as a source, travels to them as a whole
    cloudpickle.register_pickle_by_value(found)
    spec.loader.exec_module(found)
    return found


def load(source: str) -> TrainConfig:
    """The config that NAME[:VARIANT] or FILE.py[:VARIANT] stands for.

    Raises: ConfigError for an unknown name or variant, for any error in the file, and for attributes that are
      not fields.
    """
    name, colon, variant = source.partition(":")
    arguments = [variant] if colon else []
    try:
        found = module(name).get_config(*arguments)
    except OmniFusionError:
        raise
    except Exception as error:  # in the user's own code: say in which line
        file = Path(name).expanduser().absolute()
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == file]
        where = ""
        if lines or isinstance(error, SyntaxError):
            where = f", line {getattr(error, 'lineno', None) or lines[-1]}"
        raise ConfigError(f"{name}{where}: {type(error).__name__}: {error}") from error
    if not isinstance(found, TrainConfig):
        raise ConfigError(f"{name}: get_config gives {type(found).__name__}, a TrainConfig is expected")
    for path in strays(found):
        meant = nearest(path, fields(found))
        advice = f": is {meant} meant?" if meant else ""
        raise ConfigError(f"{name} sets {path}, which is no field of TrainConfig{advice}")
    return found
