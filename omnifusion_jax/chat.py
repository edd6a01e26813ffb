"""python -m omnifusion_jax.chat --model=M [--image=F]

In a pipe each line is a question, and only answers are printed: echo 'What is it?' | python -m ...
"""

import functools
import os
import sys
from pathlib import Path

from absl import flags

from omnifusion_jax.cli.command import run
from omnifusion_jax.cli.memory import memory
from omnifusion_jax.cli.model_flags import ModelFlags
from omnifusion_jax.cli.overrides import GenerationFlags
from omnifusion_jax.conversation import lines
from omnifusion_jax.conversation.commands import listed
from omnifusion_jax.conversation.loop import converse
from omnifusion_jax.conversation.pictures import drawn
from omnifusion_jax.conversation.talk import Shown, Talk

MODEL = ModelFlags()
IMAGE = flags.DEFINE_multi_string("image", [], "Picture to talk about")
VERBOSE = flags.DEFINE_bool("verbose", False, "Says how long the first words of an answer took, and all.")
HISTORY = flags.DEFINE_string(
    "history", "~/.local/state/omnifusion_jax/chat_history", "File of the lines typed before; empty: none."
)
GENERATION = GenerationFlags()


def main(_):
    terminal = sys.stdin.isatty()
    # These come before the model, which takes long to load, so that their errors show at once.
    shown = [Shown.of(name) for name in IMAGE.value]
    generation = GENERATION.value
    if terminal and HISTORY.value:
        lines.remember(Path(HISTORY.value))
    model = MODEL.load()
    draw = functools.partial(drawn, environment=os.environ) if sys.stderr.isatty() else lambda image: ""
    if terminal:
        print(memory(model))
        print(listed())
    talk = Talk(model, generation, shown)
    vain = converse(talk, lines.typed() if terminal else lines.piped(), draw=draw, verbose=VERBOSE.value)
    return 1 if vain and not terminal else 0


if __name__ == "__main__":
    run(main, GENERATION, MODEL.mesh)
