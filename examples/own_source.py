"""A source of one's own, in a config file of one's own: pictures of one colour.

    python -m omnifusion_jax.train --config=examples/own_source.py --workdir=runs/colours

learns to name it; `data.path=colours:8` is eight pictures.
"""

import numpy as np

from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.errors import DataError
from omnifusion_jax.shipped import tiny
from omnifusion_jax.tables import SOURCES

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 90, 230), "yellow": (240, 210, 50)}


class Colours:
    """It has a length and gives the Dialogue at an index, the same one every time."""

    def __init__(self, count):
        self.count = count
        self.fingerprint = f"colours:{count}"  # a run that goes on asks for the same one

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        picture = np.broadcast_to(np.uint8(colour), (96, 96, 3))
        turns = (("user", "Which colour is it?"), ("assistant", name))
        return Dialogue(f"colours[{i}]", turns, (Media("image", picture),))


@SOURCES.row("colours")
def open_colours(rest, images, side):
    if not rest.isdigit():
        raise DataError(f"colours:{rest} is not a number of pictures, as in colours:8")
    return Colours(int(rest))


def get_config(name="pretrain"):
    config = tiny.get_config(name)
    config.data.path, config.eval.path, config.batch_size = "colours:8", "colours:4", 8
    return config
