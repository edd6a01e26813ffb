"""What a source is."""

from typing import Protocol

from omnifusion_jax.data.dialogues import Dialogue

ENDLESS = 2**30  # records of a source without an end


class Source(Protocol):
    """Dialogues by number: always the same one at an index.

    A source is pickled for worker processes: what should not travel (open files, maps of files) is opened
    again there. Indexing must work in several threads at once. A source may have a `fingerprint`, a string
    that differs for other data; a continued run requires the same one. It may have `id`, a function of a
    number that gives the id of a record, or None; it raises DataError for a record that cannot be read.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Dialogue:
        """Raises DataError for a record that cannot be used; other records can be asked for all the same."""

    def where(self, i: int) -> str:
        """The place of a record, for messages: a file and a line, or the like."""
