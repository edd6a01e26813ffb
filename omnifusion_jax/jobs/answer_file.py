"""Answers a file of requests, and continues where an earlier run stopped."""

from pathlib import Path
from typing import NamedTuple

from omnifusion_jax.config import GenerationConfig, one_of
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.model import Model
from omnifusion_jax.jobs import header, parts
from omnifusion_jax.jobs.asking import Asking, in_order
from omnifusion_jax.jobs.output import Output
from omnifusion_jax.jobs.parts import Part
from omnifusion_jax.jobs.progress import JobProgress
from omnifusion_jax.jobs.requests import open_requests
from omnifusion_jax.jobs.rows import DONE, ORDERS, row

JSON = (".json", ".jsonl")


class Summary(NamedTuple):
    answers: int  # in the file of answers
    errors: int  # answers that are errors
    kept: int  # answers that were already there
    retried: int  # kept answers that were errors and have been tried again
    first: int | None  # the line of the file, from 1 on, that is the first error


def answer_file(
    model: Model,
    source: str | Path,
    target: Path,
    images: str | Path,
    generation: GenerationConfig,
    batch_size: int = 16,
    *,
    order: str = "input",
    retry_errors: bool = False,
    num_workers: int = 0,
    part: Part | None = None,
    progress: JobProgress | None = None,
) -> Summary:
    """Answers the requests of `source` and writes the answers to `target`, as they are ready.

    An answer is a line {"id", "text", "tokens", "finish_reason", "error"}, with "others" and "likeliest" as
    in an Answer where `generation` asks for them. A file beside it,
    `TARGET.header.json`, says what made the answers: model, settings and folder of pictures. If these are
    still the same, a run that was cut off continues. The answer to a bad request holds its error; the others
    are answered all the same.

    Args:
      source: any that `data.sources` knows, of messages or of LLaVA records, whose last assistant turn is
        removed for the model to answer.
      images: the folder to which names of pictures are relative.
      order: of the answers: "input", as the requests stand; or "done", as they are ready, each with a field
        "place", that of its request from 0 on.
      retry_errors: requests whose answers in `target` are errors are tried again and the answers replaced;
        all other answers stay the same, byte for byte.
      num_workers: processes that read requests and decode pictures; with 0 threads of this process do.
      part: what one of several hosts answers, in a file of its own; the last host to end makes `target` of
        these files. None: there are no other hosts.
      progress: is told how far the job is.

    Raises:
      DataError: `source` cannot be read, `target` does not belong to it or is to be Parquet, or `target` was
        made by another model or with other settings.
      OmniFusionError: `target` cannot be written, or another process writes it.
    """
    one_of("order", order, ORDERS)
    check_files(source, target)
    requests = open_requests(source, images, model, generation.max_new_tokens)
    made = header.header(model, images, generation) | {"order": order, "part": None}
    with progress or JobProgress() as progress:
        asking = Asking(model, requests, generation, batch_size, num_workers, progress)
        if part is None:
            return answered(asking, target, made, range(len(requests)), retry_errors)
        if target.exists():
            rows = parts.joined(target, made, requests, retry_errors)
            parts.tidy(target, part)
            return Summary(len(rows), rows.errors, len(rows), 0, rows.first)
        mine, places = parts.header_of(part, made, requests), part.places(len(requests))
        own = answered(asking, part.file(target), mine, places, retry_errors)
        rows = parts.join(target, made, requests, part)
        if rows is None:
            return own
        kept = len(rows) - (own.answers - own.kept)
        return Summary(len(rows), rows.errors, kept, own.retried, rows.first)


def check_files(source: str | Path, target: Path) -> None:
    """Raises DataError for files that `answer_file` does not take, before a model is loaded for them."""
    if Path(source).suffix in JSON and not Path(source).is_file():
        raise DataError(f"{source} does not exist: it should hold one request a line, or a list of them")
    if target.suffix == ".parquet":
        raise DataError(
            f"{target}: answers are lines of JSON, written as they are ready, and Parquet is written whole. "
            f"Give {target.with_suffix('.jsonl').name} as output; pandas.read_json(file, lines=True) reads it"
        )
    if target.is_dir():
        raise DataError(f"{target} is a folder: give a file as output, such as {target / 'answers.jsonl'}")
    if target.resolve() == Path(source).resolve():
        raise DataError(f"{target} is the file of requests: give another output")


def answered(asking, target, made, places, retry_errors):
    """The Summary of a file of answers to the requests at `places`, when it has all of them."""
    with Output.opened(target, made, asking.requests, places) as output:
        rows, kept = output.rows, len(output.rows)
        again = [number for number in range(kept) if rows.failed[number]] if retry_errors else []
        asking.progress.start(len(places), kept - len(again))
        if again:
            retry(asking, output, again)
        add(asking, output)
        return Summary(len(rows), rows.errors, kept, len(again), rows.first)


def add(asking, output):
    """Answers the requests that have no answer yet."""
    order = output.made["order"]
    answers = asking.answers(output.rows.left())
    with output.adding() as write:
        for place, name, answer in answers if order == DONE else in_order(answers, output.rows.left()):
            write(place, *row(place, name, answer, order))
            asking.progress.advance(answer)


def retry(asking, output, numbers):
    """Answers the requests of rows again, by the numbers of the rows, and replaces them."""
    number_of, new = {output.rows.answered[number]: number for number in numbers}, {}
    try:
        for place, name, answer in asking.answers(sorted(number_of)):
            new[number_of[place]] = row(place, name, answer, output.made["order"])
            asking.progress.advance(answer)
            if len(new) == asking.window:  # so that a run that is cut off loses little
                output.replace(new)
                new = {}
    finally:
        if new:
            output.replace(new)
