"""Steps skipped for a NaN or infinite loss or gradient: what they read, and when there are too many."""

from collections.abc import Callable
from pathlib import Path

from omnifusion_jax import hosts
from omnifusion_jax.errors import OmniFusionError
from omnifusion_jax.training.lines import read_rows, write_rows
from omnifusion_jax.training.workdir import writing


class NotFinite(OmniFusionError):
    """Too many steps had a NaN or infinite loss."""


class BadSteps:
    """Counts the bad steps of a run, and writes what they read to WORKDIR/bad_steps.jsonl.

    A line is `{"step": 131, "parameters": ["decoder/embed", ...], "rows": [["dialogues.json:17"], ...]}`: the
    parameters whose gradient was NaN or infinite, and the places of the records in each row.

    Args:
      most: so many in one start of the run end it.
      begun: the step that this start goes on from; what was written of later ones is removed.
      before: how many there had been by then.
    """

    def __init__(self, workdir: Path, most: int, begun: int, before: int):
        self.file, self.most, self.before, self.count = workdir / "bad_steps.jsonl", most, before, before
        rows = read_rows(self.file) if hosts.first() else []
        if any(row["step"] > begun for row in rows):
            with writing(self.file):
                write_rows(self.file, [row for row in rows if row["step"] <= begun])

    def take(self, step: int, count: int, broken: list[str], places: Callable[[], list[list[str]]]):
        """Takes how many bad steps there are after `step`.

        Args:
          broken: the parameters whose gradient is not finite.
          places: gives the place of every record of the step, row by row; all hosts call it together.
        Raises: NotFinite when they are too many.
        """
        if count > self.count:
            line = {"step": step, "parameters": broken, "rows": places()}
            if hosts.first():
                with writing(self.file):
                    write_rows(self.file, [*read_rows(self.file), line])
        self.count, bad = count, count - self.before
        if bad >= self.most:
            raise NotFinite(
                f"step {step}: {bad} steps had a NaN or infinite loss or gradient and were skipped; "
                f"max_bad_steps is {self.most}. "
                "Lower optimizer.learning_rate, check the data, or set compute_dtype=float32. "
                f"{self.file} has what each of them read, and --replay={step} looks at the last one again"
            )
