"""python -m omnifusion_jax.convert --source=DIR_OR_HUB_ID --output=DIR \
[--to=native|omnifusion|llava|omnilmm|llama]

Converts checkpoints. --inspect prints what a source is instead, and where each array comes from.
Parts are put together without a source:

    python -m omnifusion_jax.convert --vision=... --decoder=... [--vision2=...] [--preset=NAME] --output=DIR
"""

import collections
import math
import time
from pathlib import Path

import jax
from absl import flags

from omnifusion_jax.checkpoints import integers
from omnifusion_jax.checkpoints.assemble import SEED
from omnifusion_jax.checkpoints.base import WEIGHTS as KEPT_AS
from omnifusion_jax.checkpoints.convert import WRITERS, convert
from omnifusion_jax.checkpoints.inspect import inspect, lines
from omnifusion_jax.checkpoints.load import FORMATS
from omnifusion_jax.checkpoints.omnifusion import two_encoders
from omnifusion_jax.checkpoints.omnifusion.two_encoders import Ambiguous
from omnifusion_jax.checkpoints.storage.settings import write_json
from omnifusion_jax.cli import command
from omnifusion_jax.config import check, part_of
from omnifusion_jax.data.pictures import ImageProcessor

SOURCE = flags.DEFINE_string(
    "source", None, "Checkpoint: directory, or id on the Hugging Face Hub. Its format is recognised."
)
OUTPUT = flags.DEFINE_string("output", None, "New directory.")
INSPECT = flags.DEFINE_bool("inspect", False, "Print what the source is, and write nothing.")
FORMAT = flags.DEFINE_enum(
    "format", None, list(FORMATS), "Format that the source must have; recognised when not given."
)
TO = flags.DEFINE_enum("to", "native", list(WRITERS), "Format to write.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Type to write; as stored when not given.")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, KEPT_AS, "What kernels of the decoder are written as; as stored when not given."
)
VISION = flags.DEFINE_string(
    "vision",
    None,
    "Vision tower, for a source that holds none: openai/clip-vit-large-patch14-336, or a directory.",
)
VISION2 = flags.DEFINE_string(
    "vision2", None, "The second one, of a two-encoder model: facebook/dinov2-large, or a directory."
)
DECODER = flags.DEFINE_string(
    "decoder", None, "Language model, to be put together with --vision (and --vision2) instead of a --source."
)
BASE = flags.DEFINE_string(
    "base",
    None,
    "Whole model that a source of trained parts was trained on. LoRA's factors are merged into it.",
)
PRESET = flags.DEFINE_string(
    "preset",
    None,
    "How such parts are joined, or what model the original's phase 1 was run for: omnifusion-1.1, ...",
)
ASSIGN = flags.DEFINE_string(
    "assign", None, "JSON file that says what the tensors of a two-encoder adapter are."
)
CHECK = flags.DEFINE_string(
    "check_with", None, "Picture on which the possible readings of a two-encoder adapter are measured."
)


def main(_):
    jax.config.update("jax_platforms", "cpu")  # a model may be larger than an accelerator's memory
    start = time.time()
    options = {
        "vision": VISION.value,
        "vision2": VISION2.value,
        "assign": ASSIGN.value,
        "preset": PRESET.value,
    }
    options |= {"format": FORMAT.value, "dtype": DTYPE.value, "base": BASE.value, "weights": WEIGHTS.value}
    if INSPECT.value:
        check(bool(SOURCE.value), "--inspect needs --source")
        print("\n".join(lines(*inspect(SOURCE.value, **options))))
        return
    check(bool(OUTPUT.value), "--output is missing: the new directory")
    try:
        checkpoint, fresh = convert(SOURCE.value, OUTPUT.value, TO.value, decoder=DECODER.value, **options)
    except Ambiguous as error:
        offer(error, Path(f"{OUTPUT.value}.assign.json"))
        raise
    if CHECK.value:
        print("--check_with has nothing to rank: the adapter's tensors are known, or told by --assign")
    print(f"{SOURCE.value or DECODER.value}: {checkpoint.format}, {checkpoint.config.preset}")
    for part, count in counts(checkpoint.arrays).items():
        note = f", freshly initialised (seed {SEED}), to be trained" if part in fresh else ""
        print(f"  {part:16} {count:>14,} parameters{note}")
    if len(checkpoint.config.image.encoders) > 1 and not fresh:
        adapter = {path: a for path, a in checkpoint.arrays.items() if path.startswith("image/adapter/")}
        print(*(f"  {path} <- {a.origin}" for path, a in adapter.items()), sep="\n")
    written = sum(file.stat().st_size for file in Path(OUTPUT.value).rglob("*") if file.is_file())
    print(f"{OUTPUT.value}: {TO.value}, {written:,} bytes, {time.time() - start:.1f} s")


def offer(error: Ambiguous, file: Path):
    """Writes the likeliest reading to `file`, for the user to correct.

    With --check_with, all readings are ranked by the picture and printed first.
    """
    check(
        not file.exists(),
        f"{file} is there already: pass it as --assign, or remove it for a new one. {error}",
    )
    check(
        not CHECK.value or error.distances,
        "--check_with: this source has no encoders and no decoder to look at a picture with",
    )
    if CHECK.value:
        distances = error.distances(ImageProcessor.of(error.config.image)(CHECK.value).views)
        ranked = sorted(zip(distances, error.readings, strict=True), key=lambda row: row[0])
        error.readings = [reading for _, reading in ranked]
        for distance, reading in ranked:
            print(f"log ratio of norms {distance:.3f}", *two_encoders.lines(reading), sep="\n")
    write_json(file, error.readings[0])
    rank = "nearest" if CHECK.value else "likeliest"
    print(f"{file} holds the {rank} reading: correct it, and pass --assign={file}")


def counts(arrays) -> dict[str, int]:
    """The number of parameters of each part."""
    found = collections.Counter()
    for path, shape in integers.shapes(arrays).items():
        found[part_of(path)] += math.prod(shape)
    return found


if __name__ == "__main__":
    command.run(main)
