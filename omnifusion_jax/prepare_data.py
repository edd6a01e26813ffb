"""python -m omnifusion_jax.prepare_data --data=SOURCE [--images=DIR] --output=DIR [--num_workers=N]

Writes data as files that are read fast at random, with the pictures in them. SOURCE is whatever data.path
takes, and so is the output when it is done. What was cut off goes on with the same command.
--to=tfds --name=NAME writes a data set of TensorFlow Datasets instead.
--features=CONFIG [--config.FIELD=...] writes what the frozen encoders of that config make of the pictures in
place of them: training with this config then does without its encoders, with the same losses.
"""

import os
import shlex
import sys
from pathlib import Path

from absl import flags
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from omnifusion_jax.cli.command import run
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.config import check
from omnifusion_jax.data.prepared.folder import prepare_files
from omnifusion_jax.data.prepared.plan import planned
from omnifusion_jax.data.prepared.tfds_files import VERSION, write_tfds
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.run import completed, starting_point
from omnifusion_jax.training.features import feature_shards
from omnifusion_jax.training.signals import Stop, Stopped

DATA = flags.DEFINE_string("data", None, "Any source, as for data.path.", required=True)
IMAGES = flags.DEFINE_string("images", "", "Folder that names of pictures are relative to, as data.images.")
OUTPUT = flags.DEFINE_string("output", None, "New folder, or one that was begun.", required=True)
WORKERS = flags.DEFINE_integer(
    "num_workers", os.cpu_count(), "Processes that read and write; tfds has one.", lower_bound=1
)
COUNT = flags.DEFINE_integer("count", None, "Only the first so many records.", lower_bound=1)
RECORDS = flags.DEFINE_integer(
    "shard_records", None, "Records in a file; when not given, as many as make --shard_mb.", lower_bound=1
)
MEGABYTES = flags.DEFINE_integer("shard_mb", 256, "Size of a file in megabytes, roughly.", lower_bound=1)
ON_BAD = flags.DEFINE_enum(
    "on_bad_sample", "raise", ["raise", "skip"], "Stop at a record that cannot be used, or leave it out."
)
MAX_PIXELS = flags.DEFINE_integer("max_pixels", 50_000_000, "As data.max_pixels.", lower_bound=1)
SIDE = flags.DEFINE_integer("side", 6, "Patches a side of a picture in words, for synthetic:text.")
TO = flags.DEFINE_enum("to", "array_record", ["array_record", "tfds"], "Format to write.")
NAME = flags.DEFINE_string("name", "dialogues", "Of the data set, with --to=tfds.")
CONFIG = ConfigFlags(flag="features", meaning="Write features in place of pictures, for the training of ")


def main(_):
    output, stop = Path(OUTPUT.value), Stop()
    try:
        with stop:
            output, done = prepare(output)
    except Stopped:
        kept = len(list(output.glob("*.array_record")))
        print(
            f"stopped by {stop.asked.name}: {output} keeps {kept} complete files. The same command goes on: "
            f"{shlex.join(sys.orig_argv)}"
        )
        return stop.status
    made = "features of " if CONFIG.source.value else ""
    media = "".join(f", {made}{number:,} {stream} files" for stream, number in done["media"].items())
    print(f"{output}: {done['records']:,} records{media}, {done['bytes']:,} bytes")
    for reason, number in done["skipped"].items():
        print(f"  {number:,} left out: {reason}")


def prepare(output: Path) -> tuple[Path, dict]:
    """The folder that is written, and what is in it."""
    source = open_source(DATA.value, IMAGES.value, SIDE.value)
    sizes = {"shard_records": RECORDS.value, "shard_bytes": MEGABYTES.value << 20}
    make, settings = None, {}
    named = bool(CONFIG.source.value)
    check(named or not CONFIG.given, "--config.FIELD changes the config that --features names: name one")
    if named:
        check(TO.value == "array_record", "--to=tfds has no place for features: leave it, or --features, out")
        config = CONFIG.value
        if not config.data.sets:
            config.data.path = DATA.value
        config = completed(config)
        make, settings = feature_shards(config, starting_point(config)[0], MAX_PIXELS.value)
    plan = planned(
        source, DATA.value, IMAGES.value, count=COUNT.value, max_pixels=MAX_PIXELS.value, **sizes, **settings
    )
    columns = TextColumn("{task.completed:,}/{task.total:,} records"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("", total=plan.records)
        options = {"skip": ON_BAD.value == "skip", "advance": lambda records: progress.advance(task, records)}
        if TO.value == "tfds":
            return output / NAME.value / VERSION, write_tfds(source, output, plan, NAME.value, **options)
        return output, prepare_files(source, output, plan, workers=WORKERS.value, features=make, **options)


if __name__ == "__main__":
    run(main, CONFIG)
