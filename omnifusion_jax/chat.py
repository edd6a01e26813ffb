"""python -m omnifusion_jax.chat --model=M [--image=F]"""

from absl import flags

from omnifusion_jax.api import load
from omnifusion_jax.cli import define_generation, run
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import DataError

MODEL = flags.DEFINE_string("model", "omnifusion-tiny", "Bundled name, directory or hub id.")
VISION = flags.DEFINE_string("vision", None, "Vision tower, where the model does not hold one.")
IMAGE = flags.DEFINE_string("image", None, "Picture to talk about.")
DTYPE = flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of parameters and computation; float32 on CPUs, else bfloat16, when not given.")
GENERATION = define_generation()

HELP = "/image FILE shows another picture, /image alone none, /new starts again, /quit or Ctrl-D leaves; Ctrl-C stops an answer."


def answer(model, request, generation):
    """Prints an answer as it comes; Ctrl-C stops it. Returns what was said so far."""
    said = ""
    # beams are known only when all is said
    pieces = model.stream(request, generation) if generation.num_beams == 1 else (a.text for a in model.generate([request], generation))
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
            said += piece
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return said


def converse(model, images, generation):
    """Reads lines until the end of input. A turn that cannot be answered is taken back."""
    messages = []
    while True:
        try:
            line = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command in ("/image", "/new"):
            images, messages = [rest][: bool(rest)] if command == "/image" else images, []
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                said = answer(model, Request(asked, images), generation)
            except DataError as error:
                print(f"error: {error}")
                continue
            messages = [*asked, {"role": "assistant", "content": said}] if said.strip() else messages


def main(_):
    model = load(MODEL.value, vision=VISION.value, dtype=DTYPE.value)
    print(HELP)
    converse(model, [IMAGE.value] if IMAGE.value else [], GENERATION())


if __name__ == "__main__":
    run(main)
