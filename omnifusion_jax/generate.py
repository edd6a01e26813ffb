"""python -m omnifusion_jax.generate --model=M --input=in.jsonl --output=out.jsonl \
[--images=DIR] [--generation.max_new_tokens=50]

Answers a file of requests. What was cut off, however it ended, goes on with the same command.

Exit status: 0, but 1 if every answer is an error or the command is wrong, and 130 after Ctrl-C.
"""

import os
import signal
from pathlib import Path

from absl import flags
from rich.console import Console

from omnifusion_jax.cli.command import run
from omnifusion_jax.cli.memory import memory
from omnifusion_jax.cli.model_flags import ModelFlags
from omnifusion_jax.cli.overrides import GenerationFlags
from omnifusion_jax.hosts.environment import one_of_several
from omnifusion_jax.jobs.answer_file import answer_file, check_files
from omnifusion_jax.jobs.parts import Part
from omnifusion_jax.jobs.progress import JobProgress
from omnifusion_jax.jobs.rows import ORDERS

MODEL = ModelFlags()
INPUT = flags.DEFINE_string(
    "input", None, "Requests, or LLaVA records: JSONL, or any source as for data.path.", required=True
)
OUTPUT = flags.DEFINE_string(
    "output", None, "JSONL of answers; one that is half written is continued.", required=True
)
IMAGES = flags.DEFINE_string("images", "", "Folder that image names are relative to.")
BATCH = flags.DEFINE_integer("batch_size", 16, "Requests answered together.", lower_bound=1)
ORDER = flags.DEFINE_enum(
    "order", "input", ORDERS, "Of the answers: as the requests stand, or as they are done, with their place."
)
RETRY = flags.DEFINE_bool(
    "retry_errors", False, "Lines of the output that are errors are tried again and replaced."
)
WORKERS = flags.DEFINE_integer(
    "num_workers", 0, "Processes that read requests and pictures; 0: threads.", lower_bound=0
)
HOST = flags.DEFINE_integer(
    "host",
    None,
    "The number, from 0, of one of several hosts that share the input; with --of.",
    lower_bound=0,
)
OF = flags.DEFINE_integer(
    "of",
    None,
    "How many hosts there are. Found by itself under Slurm, Open MPI and in JobSets.",
    lower_bound=1,
)
GENERATION = GenerationFlags()


def main(_):
    progress, target = JobProgress(Console(stderr=True)), Path(OUTPUT.value)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, progress.stop)
    several = one_of_several(HOST.value, OF.value, os.environ)
    part = several and Part(*several)
    check_files(INPUT.value, target)
    try:
        model = MODEL.load()
        print(memory(model))
        done = answer_file(
            model,
            INPUT.value,
            target,
            Path(IMAGES.value),
            GENERATION.value,
            BATCH.value,
            order=ORDER.value,
            retry_errors=RETRY.value,
            num_workers=WORKERS.value,
            part=part,
            progress=progress,
        )
    except KeyboardInterrupt:
        again = f"; {progress.lost} requests that were begun are asked again" if progress.lost else ""
        print(
            f"\nstopped; {part.file(target) if part else target} keeps the answers that are written{again}. "
            "The same command goes on from there"
        )
        return 0 if progress.asked == signal.SIGTERM else 130  # a scheduler's stop is no failure
    before = f"; {done.kept} were there already" if done.kept else ""
    if done.retried:
        before += f", {done.retried} errors tried again"
    advice = f"; the first error is line {done.first}; --retry_errors tries them again" if done.errors else ""
    where = part.file(target) if part and not target.exists() else target
    print(f"{where}: {done.answers} answers, {done.errors} of them errors{before}{advice}")
    return int(0 < done.answers == done.errors)


if __name__ == "__main__":
    run(main, GENERATION, MODEL.mesh)
