"""Where dialogues come from: the rows of `tables.SOURCES`, one file each.

A row is a function (path, images, side) that opens a source, as `base.Source` describes it. `images` is the
folder to which names of pictures are relative, `side` the number of patches a side of a picture.
"""

from pathlib import Path

from omnifusion_jax.data.images import is_data_url, is_url, short
from omnifusion_jax.data.sources.array_record import ArrayRecordSource
from omnifusion_jax.data.sources.base import ENDLESS, Source
from omnifusion_jax.data.sources.json_file import JsonSource
from omnifusion_jax.data.sources.synthetic_pictures import SYNTHETIC, SyntheticSource
from omnifusion_jax.data.sources.tfds import TfdsSource
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES

__all__ = [
    "ENDLESS",
    "SYNTHETIC",
    "ArrayRecordSource",
    "JsonSource",
    "Source",
    "SyntheticSource",
    "TfdsSource",
    "open_source",
]

# The row that reads a file, by the end of its name
SUFFIXES = {".json": "json", ".jsonl": "json", ".array_record": "array_record"}
# The row that reads a folder, by what is in it: the first that is found counts
FOLDERS = {
    "dataset.json": "array_record",
    "unfinished": "array_record",
    "*.array_record": "array_record",
    "features.json": "tfds",
}


def open_source(path: str, images: str, side: int) -> Source:
    """The source at a path: a file or folder that is known by its name, or ROW:PATH for a row of SOURCES.

    Raises:
      DataError: the source does not exist or cannot be read.
    """
    if is_url(path) or is_data_url(path):
        raise DataError(f"data.path={short(path)} is not fetched: download it, and give the path of the file")
    name, colon, rest = path.partition(":")
    if colon and name in SOURCES.names():
        return SOURCES[name](rest, images, side)
    row = SUFFIXES.get(Path(path).suffix, "json")
    if Path(path).is_dir():
        row = next((row for inside, row in FOLDERS.items() if any(Path(path).glob(inside))), "json")
    return SOURCES[row](path, images, side)
