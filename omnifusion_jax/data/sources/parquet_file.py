"""A Parquet file as a table whose parts, its row groups, are decoded one at a time."""

import hashlib
from pathlib import Path

from omnifusion_jax.data.sources.arrow_file import faults
from omnifusion_jax.data.sources.rows import chosen
from omnifusion_jax.errors import DataError


class ParquetFile:
    """The row groups of a file, of whose columns `rows.chosen` are read and no others.

    Only their numbers of rows are held. `digest` covers the footer of the file: its columns, and of each in
    each row group the numbers of bytes and, where its writer put them down, the least and greatest value.

    Raises:
      DataError: the file is not a Parquet file, is damaged, or has no turns.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with faults("Parquet"), self.opened() as file:
                footer, self.columns = file.metadata, chosen(file.schema_arrow.names)
                groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
                self.rows = [group.num_rows for group in groups]
                # that a part takes in memory, at most: those of columns that are not read count too
                self.bytes = max((group.total_byte_size for group in groups), default=0)
                self.digest = self.digest_of(footer)
        except DataError as error:
            raise error.at(path) from error

    def opened(self):
        from pyarrow import parquet

        return parquet.ParquetFile(self.path, page_checksum_verification=True)

    def digest_of(self, footer):
        length = footer.serialized_size + 8  # with its length and the mark of the format
        with open(self.path, "rb") as file:
            file.seek(-length, 2)
            return hashlib.blake2b(file.read(), digest_size=16).hexdigest()

    def part(self, i: int, columns: list[str] | None = None):
        """A row group as a table, of all columns if none are named.

        Raises DataError, without the file's name, if it is damaged.
        """
        with faults("Parquet"), self.opened() as file:
            if self.digest_of(file.metadata) != self.digest:
                raise DataError("the file was changed while it was being read", "changed")
            table = file.read_row_group(i, columns or self.columns, use_threads=False)
            if len(table) != self.rows[i]:
                raise DataError(
                    f"a row group has {len(table)} rows, but {self.rows[i]} by the footer", "damaged"
                )
            return table
