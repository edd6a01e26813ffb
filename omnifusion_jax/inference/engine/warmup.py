"""Runs every program of an engine once in every size, so that nothing is compiled while requests wait."""

import numpy as np

from omnifusion_jax.inference.engine.programs import Rows
from omnifusion_jax.inference.engine.sizes import together


def warm_up(scheduler):
    """Leaves a Scheduler, which nobody may be in, as it was made."""
    device = scheduler.device
    with device.spread():
        for features in device.features:
            features.warm_up()
        for length in scheduler.lengths:
            for count in scheduler.counts:
                device.reset()
                device.resize(count, length, device.sizes)
                run_all(scheduler)
                for more in (n for n in scheduler.counts if n > count):
                    device.grow(more, length)
                for longer in (n for n in scheduler.lengths if n > length):
                    device.grow(count, longer)
    scheduler.reset()


def run_all(scheduler):
    """Runs the programs that leave the sizes as they are, in slots that nobody is in."""
    device = scheduler.device
    for size in (0, *(size for size in scheduler.chunks if size <= device.length)):
        for n in together(size, device.count) if device.ways == 1 else (device.count,):
            for fresh in (True, False) if size else (False,):
                device.extend(scheduler.chunk([], n, size), fresh)
    device.copy(0, 0)
    device.clear(0)
    nobody = np.zeros(device.count * device.sizes.beams, bool)
    device.advance(Rows(np.zeros(device.count, np.int32), nobody, nobody), 1, eager=False)
    device.answers()
