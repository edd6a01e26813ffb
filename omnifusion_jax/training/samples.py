"""samples.jsonl: what a run answered to the same few questions, a line for each evaluation."""

from collections.abc import Sequence
from pathlib import Path

from omnifusion_jax.training.lines import read_rows, write_rows

FIELDS = ("question", "truth", "answer")


def add_samples(path: Path, step: int, records: Sequence):
    """Writes the line of the evaluation after `step`, and drops those of later steps, which come again.

    Args:
      records: evaluation.exact_match.Records.
    """
    rows = [row for row in read_rows(path) if row["step"] < step]
    rows.append({"step": step, "samples": [{name: getattr(r, name) for name in FIELDS} for r in records]})
    write_rows(path, rows)


def read_samples(path: Path) -> dict[tuple[int, str, str], list[tuple[int, str]]]:
    """{(number, question, truth): [(step, answer)]}, the steps in order; {} when there is no file."""
    found = {}
    for row in read_rows(path):
        for number, sample in enumerate(row["samples"]):
            asked = (number, sample["question"], sample["truth"])
            found.setdefault(asked, []).append((row["step"], sample["answer"]))
    return found
