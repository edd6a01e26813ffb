"""Where dialogues come from: the rows of `tables.SOURCES`, one file each.

A row is a function (path, images, side) that opens a source, as `base.Source` describes it. `images` is the
folder to which names of pictures are relative, `side` the number of patches a side of a picture.
"""

from pathlib import Path

from omnifusion_jax.data.images import is_data_url, is_url, short
from omnifusion_jax.data.sources.array_record import ArrayRecordSource
from omnifusion_jax.data.sources.base import ENDLESS, Source
from omnifusion_jax.data.sources.columns import ColumnSource
from omnifusion_jax.data.sources.json_file import JsonSource
from omnifusion_jax.data.sources.synthetic_pictures import SYNTHETIC, SyntheticSource
from omnifusion_jax.data.sources.tfds import TfdsSource
from omnifusion_jax.data.sources.webdataset import TarSource
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES

__all__ = [
    "ENDLESS",
    "SYNTHETIC",
    "ArrayRecordSource",
    "ColumnSource",
    "JsonSource",
    "Source",
    "SyntheticSource",
    "TarSource",
    "TfdsSource",
    "open_source",
]

# The row that reads a file, by the end of its name
SUFFIXES = {
    ".json": "json",
    ".jsonl": "json",
    ".array_record": "array_record",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".gz": "webdataset",  # and others: these say how to unpack them
    ".tgz": "webdataset",
}
# The row that wrote a folder, by a file that says so
MARKERS = {"dataset.json": "array_record", "unfinished": "array_record", "features.json": "tfds"}
# The row that reads any other folder, by what is in it
FOLDERS = {
    "*.array_record": "array_record",
    "*.parquet": "parquet",
    "*/*.parquet": "parquet",
    "*.arrow": "arrow",
    "*/*.arrow": "arrow",
    "*.tar": "webdataset",
}


def open_source(path: str, images: str, side: int, features: bool = False) -> Source:
    """The source at a path: a file or folder that is known by its name, or ROW:PATH for a row of SOURCES.

    Args:
      features: the source may hold features instead of media; otherwise it is refused.
    Raises:
      DataError: the source does not exist or cannot be read.
    """
    source = opened(path, images, side)
    if getattr(source, "made_by", None) and not features:
        raise DataError(
            f"{path} holds features, and pictures are needed here. They are in what it was made from, "
            f"{source.manifest['made_from']['data']}"
        )
    return source


def opened(path, images, side):
    if is_url(path) or is_data_url(path):
        raise DataError(f"data.path={short(path)} is not fetched: download it, and give the path of the file")
    name, colon, rest = path.partition(":")
    if colon and name in SOURCES.names():
        return SOURCES[name](rest, images, side)
    return SOURCES[recognised(Path(path))](path, images, side)


def recognised(path: Path) -> str:
    """The row that reads a file, a folder or a glob."""
    if not path.is_dir():
        return SUFFIXES.get(path.suffix, "json")
    for marker, row in MARKERS.items():
        if (path / marker).exists():
            return row
    rows = sorted({row for pattern, row in FOLDERS.items() if any(path.glob(pattern))})
    if len(rows) > 1:
        raise DataError(f"{path} holds files of several kinds: say which, {f':{path} or '.join(rows)}:{path}")
    return rows[0] if rows else "json"
