"""python -m omnifusion_jax.generate --model=M --input=in.jsonl --output=out.jsonl [--images=DIR] [--generation.max_new_tokens=50]"""

from pathlib import Path

from absl import flags

from omnifusion_jax.api import load
from omnifusion_jax.cli import define_generation, run
from omnifusion_jax.inference.batch_file import answer_file

MODEL = flags.DEFINE_string("model", "omnifusion-tiny", "Bundled name, directory or hub id.")
VISION = flags.DEFINE_string("vision", None, "Vision tower, where the model does not hold one.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of parameters and computation; float32 on CPUs, else bfloat16, when not given.")
INPUT = flags.DEFINE_string("input", None, "JSONL of requests, or LLaVA records.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "JSONL of answers; one that is half written is continued.", required=True)
IMAGES = flags.DEFINE_string("images", "", "Folder that image names are relative to.")
BATCH = flags.DEFINE_integer("batch_size", 16, "Requests answered together.")
GENERATION = define_generation()


def main(_):
    model = load(MODEL.value, vision=VISION.value, dtype=DTYPE.value)
    done, failed, kept = answer_file(model, Path(INPUT.value), Path(OUTPUT.value), Path(IMAGES.value), GENERATION(), BATCH.value)
    print(f"{OUTPUT.value}: {done} answers, {failed} of them errors" + (f"; {kept} were there already" if kept else ""))


if __name__ == "__main__":
    run(main)
