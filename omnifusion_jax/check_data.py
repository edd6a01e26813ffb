"""python -m omnifusion_jax.check_data --data=FILE [--images=DIR] [--config=CONFIG] [--config.FIELD=value]

Reads a whole data set, or the mixture of a config, as training would, pictures included, and says what it
holds, what is wrong with it, and how it fills rows. No device and no weights are needed. Without --config it
is read with the tokenizer and the layout of omnifusion-tiny.

Exit status: 0, nothing is wrong; 1, something is; 2, the command is, or the check could not be finished.
"""

import os
from pathlib import Path

from absl import flags

from omnifusion_jax.checkpoints.load import load_tokenizer
from omnifusion_jax.cli import command
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.config import TrainConfig, check
from omnifusion_jax.data.reading import open_reading
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.data_report import fix, report, steps, table
from omnifusion_jax.data_report.progress import read_all
from omnifusion_jax.errors import DataError
from omnifusion_jax.models.presets import preset
from omnifusion_jax.tables import OBJECTIVES

CONFIG = ConfigFlags()
DATA = flags.DEFINE_string("data", None, "Any source, instead of the data of the config.")
IMAGES = flags.DEFINE_string("images", "", "Folder that names of pictures in --data are relative to.")
OUTPUT = flags.DEFINE_string("output", "runs/check_data", "Folder for report.json and report.html.")
WORKERS = flags.DEFINE_integer("num_workers", os.cpu_count(), "Processes that read.", lower_bound=1)
FIX = flags.DEFINE_string("fix", None, "New file, NAME.json, for the records that have no problem.")
STEPS = flags.DEFINE_string(
    "steps", None, "FIRST:LAST; print which records are in these steps of the run instead."
)


def main(_):
    try:
        config = chosen()
        tokenizer = Tokenizer(load_tokenizer(config)).for_vocabulary(config.model.decoder.vocab)
        pairs = OBJECTIVES[config.objective].pairs
        data = open_reading(config.data, config.model, tokenizer, pairs)
        check(not data.source.made_by, "the data holds features: check the pictures that they were made from")
        print(table.header(report.read_with(config, data, tokenizer)), flush=True)
        return (compose if STEPS.value else look)(config, data, tokenizer)
    except KeyboardInterrupt:
        print("\nstopped: no report is written")
        return 130


def chosen() -> TrainConfig:
    """The config that says what is read, and how."""
    check(bool(DATA.value or CONFIG.source.value), "give --data=FILE, or the --config of a run")
    check(bool(DATA.value or not IMAGES.value), "--images goes with --data; a config has data.images")
    if CONFIG.source.value:
        config = CONFIG.value
    else:
        tiny = {"model": preset("omnifusion-tiny"), "tokenizer": "omnifusion-tiny-decoder"}
        config = CONFIG.over(CONFIG.begun(TrainConfig(**tiny, train_parts=((".*", 1.0),))))
    if DATA.value:
        config.data.path, config.data.images, config.data.sets = DATA.value, IMAGES.value, ()
    text = OBJECTIVES[config.objective].text
    check(text, f"objective={config.objective} reads data in a way of its own")
    return config.validate()


def look(config, data, tokenizer) -> int:
    """Checks all records, and returns the exit status."""
    folder, clean = Path(OUTPUT.value), FIX.value and Path(FIX.value)
    if clean:
        fix.check_target(clean, data.source, config.data.images)
    report.clear(folder)
    gathered = read_all(data, config.data, WORKERS.value)
    found = report.report(config, data, tokenizer, gathered)
    print(table.text(found), flush=True)
    if not found["complete"]:
        print("no report is written")
        return 2 if found["failed"] else 130
    print(*report.write(folder, found, data, tokenizer, gathered), sep=", ")
    if clean:
        count = fix.write_clean(clean, gathered, data.source, config.data.images)
        print(f"{clean}: {count:,} records without a problem")
    return 1 if found["problems"] else 0


def compose(config, data, tokenizer) -> int:
    """Prints what is in some steps of the run, and returns the exit status."""
    wanted = steps.span(STEPS.value, config.steps)
    try:
        for step, rows in steps.composition(config, data, wanted, WORKERS.value):
            for number, row in enumerate(rows):
                print(f"step {step} row {number}: {', '.join(map(data.source.where, row))}")
    except DataError as error:
        print(f"the run ends there: {table.printable(str(error))}")
        return 1
    return 0


if __name__ == "__main__":
    command.run(main, CONFIG, failed=2)
