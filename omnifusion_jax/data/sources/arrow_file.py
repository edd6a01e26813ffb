"""An Arrow file as a table whose parts, its record batches, are mapped into memory."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from omnifusion_jax.data.sources.files import files_at
from omnifusion_jax.data.sources.rows import chosen
from omnifusion_jax.errors import DataError

ENDS = 1 << 16  # bytes at either end of a file that its digest covers
COPIED = 1 << 28  # bytes of a file that may be in memory because it is compressed
FILE_MARK, STREAM_END = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def arrow_files(path: str | Path) -> list[Path]:
    """The files at a path as `files_at` has it, or those of a folder that `datasets` saved to disk.

    Raises:
      DataError: there are none, some are missing, or a folder holds several splits.
    """
    folder = Path(path)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in folder.glob("*/state.json"))
        raise DataError(f"{folder} holds several splits, {', '.join(splits)}: give the folder of one")
    if not (folder / "state.json").is_file():
        return files_at(path, ".arrow")
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = [folder / Path(file["filename"]).name for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{folder / 'state.json'} is damaged: save the data set again") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}, which its state.json names", "missing")
    return files


class ArrowFile:
    """The record batches of a file in the file format or the stream format of Arrow's IPC.

    Of its columns `rows.chosen` are read and no others. `digest` covers the numbers of rows of the
    batches and the first and last 64 kB of the file.

    Raises:
      DataError: the file is of neither format, is damaged, has no turns, or is large and compressed.
    """

    bytes = 0  # that a part takes in memory

    def __init__(self, path: Path):
        self.path = path
        try:
            names, self.batches, self.digest = opened(path)
            self.columns = chosen(names)
        except DataError as error:
            raise error.at(path) from error
        self.rows = [batch.num_rows for batch in self.batches]

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "batches"}

    @functools.cached_property
    def batches(self):
        """Of a file that travelled to another process."""
        _, batches, digest = opened(self.path)
        if digest != self.digest:
            raise DataError("the file was changed while it was being read", "changed")
        return batches

    def part(self, i: int, columns: list[str] | None = None):
        """A record batch, of all columns if none are named.

        Raises DataError, without the file's name, if it is damaged.
        """
        with faults("Arrow"):
            batch = self.batches[i].select(columns or self.columns)
            # a damaged offset would end the process; the bytes of pictures are not looked at
            batch.validate(full=True)
            return batch


def opened(path: Path) -> tuple[list[str], list, str]:
    """The names of the columns of a file, its record batches, and its digest. Raises DataError."""
    import pyarrow

    with faults("Arrow"), pyarrow.memory_map(str(path)) as file:
        whole = file.read_buffer()
        file.seek(0)
        if whole[: len(FILE_MARK)].to_pybytes() == FILE_MARK:
            reader = pyarrow.ipc.open_file(file)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            reader = pyarrow.ipc.open_stream(file)
            batches = list(reader)
            if whole[-len(STREAM_END) :].to_pybytes() != STREAM_END:  # pyarrow would take it as complete
                raise DataError("the file is cut off, or not yet complete. Copy it again", "damaged")
        copied = sum(bytes_outside(whole, batch) for batch in batches)
        if copied > COPIED:
            raise DataError(
                f"the file is compressed, and {copied / 1e6:,.0f} MB of it would be in memory all the time. "
                "Save it without compression, or as Parquet",
                "compressed",
            )
        rows = json.dumps([batch.num_rows for batch in batches]).encode()
        ends = whole[:ENDS].to_pybytes() + whole[-ENDS:].to_pybytes()
        return reader.schema.names, batches, hashlib.blake2b(rows + ends, digest_size=16).hexdigest()


def bytes_outside(whole, batch):
    """How many bytes of a record batch are not in the map of its file."""
    inside = range(whole.address, whole.address + whole.size)
    buffers = (buffer for column in batch.columns for buffer in column.buffers() if buffer is not None)
    return sum(buffer.size for buffer in buffers if buffer.address not in inside)


@contextlib.contextmanager
def faults(format: str) -> Iterator[None]:
    """Turns what pyarrow raises inside into a DataError, to which a place is to be added."""
    import pyarrow

    try:
        yield
    except (MemoryError, DataError):
        raise
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        said = str(error).split("\n")[0].rstrip(".")
        raise DataError(
            f"cannot be read as {format} ({said}). Copy the file again, if it should be such", "damaged"
        ) from error
