"""python -m omnifusion_jax.generate --model=M --input=in.jsonl --output=out.jsonl \
[--images=DIR] [--generation.max_new_tokens=50]"""

import signal
from pathlib import Path

from absl import flags

from omnifusion_jax.api import load
from omnifusion_jax.cli.command import run
from omnifusion_jax.cli.overrides import GenerationFlags, MeshFlags
from omnifusion_jax.inference.batch_file import answer_file

MODEL = flags.DEFINE_string("model", "omnifusion-tiny", "Bundled name, directory or hub id.")
VISION = flags.DEFINE_string("vision", None, "Vision tower, where the model does not hold one.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float32"],
    "Of parameters and computation; float32 on CPUs, else bfloat16, when not given.",
)
INPUT = flags.DEFINE_string("input", None, "JSONL of requests, or LLaVA records.", required=True)
OUTPUT = flags.DEFINE_string(
    "output", None, "JSONL of answers; one that is half written is continued.", required=True
)
IMAGES = flags.DEFINE_string("images", "", "Folder that image names are relative to.")
BATCH = flags.DEFINE_integer("batch_size", 16, "Requests answered together.", lower_bound=1)
RETRY = flags.DEFINE_bool(
    "retry_errors", False, "Lines of the output that are errors are tried again and replaced."
)
GENERATION, MESH = GenerationFlags(), MeshFlags()


def main(_):
    asked = []

    def stop(number, frame):
        asked.append(number)
        signal.default_int_handler(number, frame)  # raises KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        model = load(MODEL.value, vision=VISION.value, dtype=DTYPE.value, mesh=MESH.value)
        files = Path(INPUT.value), Path(OUTPUT.value), Path(IMAGES.value)
        done = answer_file(model, *files, GENERATION.value, BATCH.value, RETRY.value)
    except KeyboardInterrupt:
        print(
            f"\nstopped; {OUTPUT.value} keeps the answers that are written. "
            "The same command goes on from there"
        )
        return 0 if asked else 130  # being stopped by a scheduler is no failure
    before = f"; {done.kept} were there already" if done.kept else ""
    if done.retried:
        before += f", {done.retried} errors tried again"
    advice = "; --retry_errors tries them again" if done.errors else ""
    print(f"{OUTPUT.value}: {done.answers} answers, {done.errors} of them errors{before}{advice}")


if __name__ == "__main__":
    run(main, GENERATION, MESH)
