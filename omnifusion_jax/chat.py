"""python -m omnifusion_jax.chat --model=M [--image=F]"""

import os

from absl import flags

from omnifusion_jax.api import load
from omnifusion_jax.checkpoints.base import WEIGHTS as KEPT_AS
from omnifusion_jax.cli.command import run
from omnifusion_jax.cli.memory import memory
from omnifusion_jax.cli.overrides import GenerationFlags, MeshFlags
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.images import open_image
from omnifusion_jax.errors import DataError

MODEL = flags.DEFINE_string("model", "omnifusion-tiny", "Bundled name, directory or hub id.")
VISION = flags.DEFINE_string("vision", None, "Vision tower, where the model does not hold one.")
IMAGE = flags.DEFINE_string("image", None, "Picture to talk about.")
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["bfloat16", "float32"],
    "Of parameters and computation; float32 on CPUs, else bfloat16, when not given.",
)
WEIGHTS = flags.DEFINE_enum(
    "weights", None, KEPT_AS, "What kernels of the decoder are kept in; as stored, when not given."
)
GENERATION, MESH = GenerationFlags(), MeshFlags()

HELP = (
    "/image FILE shows another picture, /image alone none, /new starts again, /quit or Ctrl-D leaves; "
    "Ctrl-C stops an answer."
)


def pictures(name: str) -> list:
    """A list of the picture in the named file, empty if nothing was typed.

    Quotes around the name are dropped, and ~ is the user's home. Raises DataError.
    """
    name = name.strip()
    if name[:1] in ("'", '"') and name[-1:] == name[:1]:
        name = name[1:-1]
    return [open_image(os.path.expanduser(name))] if name else []


def answer(model, request: Request, generation) -> str:
    """Prints an answer as it comes; Ctrl-C stops it. Returns what the model has said so far."""
    said = ""
    try:
        if generation.num_beams == 1:
            pieces = model.stream(request, generation)
        else:  # the best beam is known only at the end
            pieces = [answer.text for answer in model.generate([request], generation)]
        for piece in pieces:
            print(piece, end="", flush=True)
            said += piece
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return said


def converse(model, images, generation):
    """Reads lines until the end of input.

    A turn that cannot be answered is taken back. A line that begins with / never goes to the model.
    """
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
        try:
            if command == "/quit":
                return
            if command == "/new":
                messages = []
            elif command == "/image":
                images, messages = pictures(rest), []
            elif line.startswith("/"):
                print(f"there is no {command}. {HELP}")
            elif line:
                asked = [*messages, {"role": "user", "content": line}]
                said = answer(model, Request(asked, images), generation)
                if said.strip():
                    messages = [*asked, {"role": "assistant", "content": said}]
        except DataError as error:
            print(f"error: {error}")


def main(_):
    # These come before the model, which takes long to load, so that their errors show at once.
    shown = pictures(IMAGE.value or "")
    generation = GENERATION.value
    model = load(MODEL.value, vision=VISION.value, dtype=DTYPE.value, weights=WEIGHTS.value, mesh=MESH.value)
    print(memory(model))
    print(HELP)
    converse(model, shown, generation)


if __name__ == "__main__":
    run(main, GENERATION, MESH)
