"""Where files are: on this machine, or in a store that is reached over the network."""

import shutil
from pathlib import Path

from etils import epath

from omnifusion_jax.errors import ConfigError


def located(place: str | Path | epath.Path) -> Path | epath.Path:
    """A place as a path: an absolute one on this machine, or gs://bucket/folder, s3://... through etils.

    Raises: ConfigError when the package for that store is not installed.
    """
    if isinstance(place, epath.Path):
        return place
    if "://" not in str(place):
        return Path(place).absolute()
    path = epath.Path(place)
    try:
        path.exists()
    except ImportError as error:
        raise ConfigError(f"{place}: {error} (pip install gcsfs for gs://, s3fs for s3://)") from error
    return path


def remote(path: Path | epath.Path) -> bool:
    """Whether a path is in a store, where nothing can be locked, appended to or renamed at once."""
    return isinstance(path, epath.Path)


def removed(folder: Path | epath.Path):
    """Removes a folder with all that is in it, if it is there."""
    if remote(folder):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
