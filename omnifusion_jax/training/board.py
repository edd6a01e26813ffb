"""Figures and sample answers for TensorBoard."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from omnifusion_jax.data.images import open_image


@contextlib.contextmanager
def hidden(module: str):
    """Makes `import module` fail within, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]


# tensorboardX imports PyTorch wherever that is installed, which takes seconds and serves nothing used here.
with hidden("torch"):
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import image, scalar, text

SIDE = 256  # pixels that a picture has at most


class Board:
    """Writes for TensorBoard, without a thread: it would wait for ever once the disk is full."""

    def __init__(self, directory: Path):
        directory.mkdir(exist_ok=True)
        self.writer = EventsWriter(str(directory / "events"))
        self.pictured = False

    def add(self, step: int, figures: Mapping[str, float]):
        for name, value in figures.items():
            self.write(step, scalar(name, value))
        self.writer.flush()

    def show(self, step: int, records: Sequence):
        """Writes questions with truth and answer as texts, and their first pictures, those only once.

        Args:
          records: evaluation.exact_match.Records, the same questions each time.
        """
        for number, record in enumerate(records):
            name = f"samples/{number}"
            self.write(
                step, text(name, f"{record.question}\n\n* truth: {record.truth}\n* answer: {record.answer}")
            )
            if record.images and not self.pictured:
                picture = open_image(record.images[0])
                picture.thumbnail((SIDE, SIDE))
                self.write(step, image(name, np.asarray(picture), dataformats="HWC"))
        self.pictured = True
        self.writer.flush()

    def write(self, step, summary):
        self.writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self):
        self.writer.close()
