"""Log-likelihoods of answers under a reference model, read from where `evaluation.reference` wrote them.

    FOLDER/reference.json    what made them: the model, the tokenizer, the layout, the data
    FOLDER/00000.parquet     those of the first PART records, and so on; a record that is bad has no row

A row is a pair of answers:

    record                          its index in the data
    digest                          of its tokens, of both dialogues
    chosen, rejected                list<float>, log p of each target, its end of sequence among them
    chosen_sum, rejected_sum        their sums
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from omnifusion_jax.batch import Sample
from omnifusion_jax.data.sources.recent import Recent
from omnifusion_jax.errors import DataError

PART = 256  # records of a file
KEPT = 256  # files that a process keeps decoded
MANIFEST = "reference.json"
REFERENCE = "reference"  # a column of Sample.extra


class Scores(NamedTuple):
    """A row: log p of the targets of both answers, float32[n], and of which tokens."""

    digest: str
    both: np.ndarray


class Reference:
    """The Scores of a record by its index.

    Raises: DataError for a folder that holds none; and for a record without a row, when it is asked for.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not (folder / MANIFEST).is_file():
            raise DataError(f"{folder} has no {MANIFEST}: there are no log-likelihoods of a reference")
        self.made_by = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self.part = Recent(self.read, KEPT)
        self.anew = f"If the data was mended since, delete {folder}: the run makes it anew"

    def __getitem__(self, i: int) -> Scores:
        found = self.part(i // PART).get(i)
        if found is None:
            raise DataError(f"the reference could not read it. {self.anew}", "reference")
        return found

    def read(self, number: int) -> dict[int, Scores]:
        file = part_file(self.folder, number)
        if not file.is_file():
            raise DataError(f"{file} is missing: start the run that makes it once more", "reference")
        from pyarrow import parquet

        rows = parquet.read_table(file).to_pylist()
        return {row["record"]: Scores(row["digest"], answers(row)) for row in rows}


def answers(row: dict) -> np.ndarray:
    """log p of the targets of both answers, one after the other."""
    return np.array([*row["chosen"], *row["rejected"]], np.float32)


def part_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.parquet"


def digest(sample: Sample) -> str:
    """A short hash of the tokens of a Sample, and of which of them are targets."""
    columns = sample.tokens.astype("<i4"), (sample.weights > 0)
    return hashlib.blake2b(b"".join(a.tobytes() for a in columns), digest_size=8).hexdigest()


@dataclasses.dataclass
class Numbered:
    """A source of (index, record) over a source of records."""

    source: Any

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        return i, self.source[i]

    def where(self, i: int) -> str:
        return self.source.where(i)

    @property
    def fingerprint(self):
        return self.source.fingerprint

    @property
    def made_by(self):
        return self.source.made_by


@dataclasses.dataclass
class PrepareReferred:
    """Makes the Sample of a numbered record, with log p of its targets under the reference in a column.

    What is wrong with the record itself is said before what is with the reference.
    """

    prepare: Callable[[Any], Sample]
    reference: Reference

    def __call__(self, numbered: tuple[int, Any]) -> Sample:
        i, record = numbered
        sample = self.prepare(record)
        try:
            scores = self.reference[i]
            if digest(sample) != scores.digest:
                raise DataError(
                    f"the reference read it with other tokens. {self.reference.anew}", "reference"
                )
        except DataError as error:
            raise error.at(record.dialogue.where) from error
        column = np.zeros(len(sample.tokens), np.float32)
        column[sample.weights > 0] = scores.both
        return sample._replace(extra=sample.extra | {REFERENCE: column})
