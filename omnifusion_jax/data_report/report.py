"""The report: what report.json holds, and how its files are written.

version    1
complete   whether every record was looked at
of         records to look at
read_with  the tokenizer's directory and number of tokens, the layout of each set, max_length
sets       {name: figures}, see `figures`
all        the figures of all sets as one
fill       how full rows are, see `fill.fill`; null if no record can be used, or not complete
problems   rows {"set", "reason", "count", "examples"}, the most frequent first; an example has its "index"
           within the mixture, its place "where" and its "message"
failed     messages of what ended a process of the check
"""

import json
import tempfile
from pathlib import Path

from omnifusion_jax.config import TrainConfig
from omnifusion_jax.data.reading import Reading
from omnifusion_jax.data_report.examples import examples
from omnifusion_jax.data_report.figures import figures
from omnifusion_jax.data_report.fill import fill
from omnifusion_jax.data_report.gather import Gathered
from omnifusion_jax.data_report.page import page
from omnifusion_jax.errors import DataError

VERSION = 1
JSON, PAGE = "report.json", "report.html"


def read_with(config: TrainConfig, data: Reading, tokenizer) -> dict:
    """What the data is read with."""
    layouts = {name: one.layout.name for name, one in zip(data.source.names, data.prepare.each, strict=True)}
    return {
        "tokenizer": str(tokenizer.directory),
        "tokens": tokenizer.vocab,
        "layouts": layouts,
        "max_length": config.data.max_length,
    }


def report(config: TrainConfig, data: Reading, tokenizer, gathered: Gathered) -> dict:
    """The report on what is gathered so far, as JSON."""
    where, longest = data.source.where, config.data.max_length
    problems = [
        {
            "set": one.name,
            "reason": reason,
            "count": problem.count,
            "examples": [{"index": i, "where": where(i), "message": text} for i, text in problem.examples],
        }
        for one in gathered.found
        for reason, problem in one.problems.items()
    ]
    return {
        "version": VERSION,
        "complete": gathered.complete,
        "of": gathered.records,
        "read_with": read_with(config, data, tokenizer),
        "sets": {one.name: figures([one], longest, where) for one in gathered.found},
        "all": figures(gathered.found, longest, where),
        "fill": fill(config, data, gathered) if gathered.complete else None,
        "problems": sorted(problems, key=lambda one: (-one["count"], one["set"], one["reason"])),
        "failed": gathered.failed,
    }


def clear(folder: Path) -> None:
    """Makes the folder of a report, without an earlier one. Raises DataError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (JSON, PAGE):
            (folder / name).unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DataError(f"--output={folder} cannot be written: {error.strerror}. Give another") from None


def write(folder: Path, report: dict, data: Reading, tokenizer, gathered: Gathered) -> tuple[Path, Path]:
    """Writes report.json and report.html, each of them whole or not at all."""
    files = folder / JSON, folder / PAGE
    texts = json.dumps(report, indent=1) + "\n", page(report, examples(data, tokenizer, gathered))
    for file, text in zip(files, texts, strict=True):
        beside = file.with_name(f"{file.name}.new")
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        beside.replace(file)
    return files
