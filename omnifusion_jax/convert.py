"""Converts checkpoints: python -m omnifusion_jax.convert --source=DIR_OR_HUB_ID --output=DIR [--to=native|omnifusion]"""

import collections
import time
from pathlib import Path

import jax
from absl import flags

from omnifusion_jax import cli
from omnifusion_jax.checkpoints.export import export_original
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.native import save_native

SOURCE = flags.DEFINE_string("source", None, "Checkpoint: directory, or id on the Hugging Face Hub. Its format is recognised.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "New directory.", required=True)
TO = flags.DEFINE_enum("to", "native", ["native", "omnifusion"], "Format to write.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Type to write; as stored when not given.")
VISION = flags.DEFINE_string(
    "vision", None, "Vision tower of a source that holds none: a directory, a file or a hub id, openai/clip-vit-large-patch14-336."
)

WRITERS = {
    "native": lambda checkpoint, output: save_native(output, checkpoint.config, checkpoint.arrays, checkpoint.tokenizer),
    "omnifusion": export_original,
}


def main(_):
    jax.config.update("jax_platforms", "cpu")  # a model may be larger than an accelerator's memory
    start = time.time()
    checkpoint = load_checkpoint(SOURCE.value, VISION.value, DTYPE.value)
    print(f"{SOURCE.value}: {checkpoint.family}, {checkpoint.config.preset}")
    for part, count in counts(checkpoint.arrays).items():
        print(f"  {part:10} {count:>14,} parameters")
    WRITERS[TO.value](checkpoint, OUTPUT.value)
    written = sum(file.stat().st_size for file in Path(OUTPUT.value).rglob("*") if file.is_file())
    print(f"{OUTPUT.value}: {TO.value}, {written:,} bytes, {time.time() - start:.1f} s")


def counts(arrays):
    found = collections.Counter()
    for path, a in arrays.items():
        found[path.split("/")[0]] += a.size
    return found


if __name__ == "__main__":
    cli.run(main)
