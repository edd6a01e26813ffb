"""Compiles a program for devices that are not there, and weighs the result."""

import collections
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import jax

from omnifusion_jax.planning import early
from omnifusion_jax.planning.hlo import Collective, collectives
from omnifusion_jax.planning.programs import Work
from omnifusion_jax.planning.topology import Place

SIZE = re.compile(r"([\d.]+)([KMGT])i?B?\b")  # as in "Used 48.92G of 15.75G hbm"
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Weighed(NamedTuple):
    """A program as the compiler made it, in bytes and seconds of one device."""

    fits: bool
    memory: int  # bytes that it takes together
    kinds: dict[str, int]  # bytes by kind, from shapes; {} if it does not fit
    moved: int  # bytes of arguments and results: each is read or written once at least
    exchanges: tuple[Collective, ...]
    seconds: float  # that compiling took


def weigh(work: Work, place: Place, written: Path | None = None) -> Weighed:
    """Compiles the program of a Work for the devices of a Place.

    It fits if the buffers that the compiler places for it are no larger together than the memory of a device,
    and the compiler does not refuse it. `written` is a folder that `early.listen` gave: what the compiler
    for TPUs decides before it generates code is taken from there.
    """
    begun = time.perf_counter()
    try:
        with jax.set_mesh(work.mesh):
            lowered = work.lower()
        made = early.decided(lowered, written) if written else whole(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = max(float(number) * UNITS[unit] for number, unit in SIZE.findall(str(error).splitlines()[0]))
        return Weighed(False, int(needed), {}, 0, (), time.perf_counter() - begun)
    return Weighed(
        made.total <= place.chip.memory,
        made.total,
        by_kind(work, made.temporary),
        made.arguments + made.results,
        tuple(collectives(made.text)),
        time.perf_counter() - begun,
    )


def whole(program) -> early.Decided:
    """The Decided of a program that is compiled to its end."""
    sizes = program.memory_analysis()
    given, made = sizes.argument_size_in_bytes, sizes.output_size_in_bytes
    total = given + sizes.temp_size_in_bytes + made - sizes.alias_size_in_bytes
    return early.Decided(program.as_text(), given, made, sizes.temp_size_in_bytes, total)


def by_kind(work: Work, temporary: int) -> dict[str, int]:
    """Bytes of a device by kind.

    What a program is given follows from shapes and shardings, as do the gradients that it adds up; what else
    it keeps for a while, `temporary` bytes together with the gradients, are activations above all. The sum is
    not quite the whole: a chip pads arrays to its tiles.
    """
    found = {kind: on_device(arrays) for kind, arrays in work.held.items()}
    found |= {kind: min(on_device(arrays), temporary) for kind, arrays in work.made.items()}
    return found | {"activations": temporary - sum(found[kind] for kind in work.made)}


def on_device(arrays) -> int:
    """Bytes of one device's pieces of arrays."""
    size = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    return sum(map(size, jax.tree.leaves(arrays)))


def exchanged(found) -> dict[tuple[str, str], tuple[int, float]]:
    """{(kind, dtype): (how often a step, bytes that a device receives a step)} of Collectives."""
    sums = collections.defaultdict(lambda: (0, 0.0))
    for one in found:
        key = one.kind, one.type.partition("[")[0]
        times, received = sums[key]
        sums[key] = times + one.times, received + one.times * one.received
    return dict(sorted(sums.items()))
