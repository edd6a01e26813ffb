"""Figures for TensorBoard."""

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path


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
    from tensorboardX.summary import scalar


class Board:
    """Writes scalars for TensorBoard, without a thread: it would wait for ever once the disk is full."""

    def __init__(self, directory: Path):
        directory.mkdir(exist_ok=True)
        self.writer = EventsWriter(str(directory / "events"))

    def add(self, step: int, figures: Mapping[str, float]):
        for name, value in figures.items():
            self.writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self.writer.flush()

    def close(self):
        self.writer.close()
