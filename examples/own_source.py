"""A source of your own in a config file of your own: pictures of a single colour.

    python -m omnifusion_jax.train --config=examples/own_source.py --workdir=runs/colours

learns to name the colour; `data.path=colours:8` means eight pictures.
"""

import numpy as np

from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.errors import DataError
from omnifusion_jax.shipped import tiny
from omnifusion_jax.tables import SOURCES

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 90, 230), "yellow": (240, 210, 50)}


class Colours:
    """A source has a length, and at each index a Dialogue that is the same every time."""

    def __init__(self, count):
        self.count = count
        self.fingerprint = f"colours:{count}"  # a run continues only on data with the same fingerprint

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        picture = np.broadcast_to(np.uint8(colour), (96, 96, 3))
        turns = (("user", "Which colour is it?"), ("assistant", name))
        return Dialogue(f"colours[{i}]", turns, (Media("image", picture),))


@SOURCES.row("colours")
def open_colours(rest, images, side):
    """Opens `colours:COUNT`; `rest` is what follows the colon, and the other arguments are not needed."""
    if not rest.isdigit():
        raise DataError(f"colours:{rest} is not a number of pictures, as in colours:8")
    return Colours(int(rest))


def get_config(name="pretrain"):
    config = tiny.get_config(name)
    config.data.path, config.eval.path, config.batch_size = "colours:8", "colours:4", 8
    return config
