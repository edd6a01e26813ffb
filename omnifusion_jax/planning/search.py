"""Looks for what fits: the rows that a device can take at a time, and what is kept for the backward pass."""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

from omnifusion_jax.config import TrainConfig
from omnifusion_jax.planning.compiled import Weighed

CHEAPEST_FIRST = ("none", "dots", "full")  # of TrainConfig.remat: least is computed again, most is kept
MOST = 64  # rows of a device at a time


class Tried(NamedTuple):
    remat: str
    rows: int  # of a device, at a time
    weighed: Weighed


def with_rows(config: TrainConfig, shards: int, rows: int) -> TrainConfig:
    """A copy of a config whose micro-batches have `rows` rows for each of `shards` devices.

    batch_size is kept if it is a multiple of that, and else rounded up.
    """
    config = copy.deepcopy(config)
    at_a_time = shards * rows
    config.grad_accum = -(-config.batch_size // at_a_time)
    config.batch_size = config.grad_accum * at_a_time
    return config


def search(config: TrainConfig, shards: int, weigh: Callable[[TrainConfig], Weighed]) -> Iterator[Tried]:
    """Tries 1, 2, 4, ... rows a device, with each way of remat, until they do not fit.

    `weigh` compiles the step of a config. A way that keeps less begins with the rows that fitted last.
    """
    rows = 1
    for remat in CHEAPEST_FIRST:
        while rows <= MOST:
            candidate = with_rows(config, shards, rows)
            candidate.remat = remat
            tried = Tried(remat, rows, weigh(candidate))
            yield tried
            if not tried.weighed.fits:
                break
            rows *= 2


def best(tried: list[Tried]) -> Tried | None:
    """The most rows that fit with the cheapest way of remat that fits at all; None if nothing does."""
    fitting = [one for one in tried if one.weighed.fits]
    return min(fitting, key=lambda one: (CHEAPEST_FIRST.index(one.remat), -one.rows), default=None)
