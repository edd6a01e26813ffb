"""Devices by name: slices of TPU chips as clouds rent them, and GPUs, for which a CPU stands in."""

import importlib.util
import math
import os
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from omnifusion_jax.chips import CHIPS, GB, Chip
from omnifusion_jax.errors import ConfigError

# How many chips lie along each axis of a slice, by the number of chips
FLAT = {n: shape for n, shape in ((1, "1x1"), (4, "2x2"), (8, "2x4"), (16, "4x4"), (32, "4x8"))}
FLAT |= {64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"}
CUBES |= {512: "8x8x8"}
# Generations: the shapes of their slices, and what the number in a name counts a chip as: v4-32 has 32 cores
TPUS = {"v4": (CUBES, 2), "v5e": (FLAT, 1), "v5p": (CUBES, 2), "v6e": (FLAT, 1)}

# No TPU is used: several processes may compile at a time, and libtpu need not look for a machine, of which it
# would tell at length that there is none.
ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


class Place(NamedTuple):
    """Devices that a program is compiled for."""

    name: str
    chip: Chip
    devices: list  # of JAX
    exact: bool  # whether they are what was asked for; else a CPU stands in, and sizes are an estimate


def tpu(name: str) -> Place:
    """The slice that a name such as v5e-16 (or v5e:4x4, as libtpu writes it) stands for.

    Raises: ConfigError for another name, and when libtpu is not installed.
    """
    found = re.fullmatch(r"(v\d+\w?)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    generation, number, shape = found.groups() if found else (None, None, None)
    if generation not in TPUS:
        raise ConfigError(f"there is no TPU slice {name!r}; choose from {', '.join(map(names, TPUS))}")
    shapes, cores = TPUS[generation]
    shape = shape or shapes.get(int(number) / cores)
    if shape is None:
        raise ConfigError(f"there is no TPU slice {name!r}; there are {names(generation)}")
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("libtpu, which has the compiler for TPUs, is not installed: pip install 'jax[tpu]'")
    together = {"chip_config_name": "megacore"} if cores == 2 else {}  # both cores of a chip are one device
    if shape == "1x1":  # libtpu takes four chips for the least that a host has
        together["chips_per_host_bounds"] = [1, 1, 1]
    for variable, value in ALONE.items():
        os.environ.setdefault(variable, value)
    try:
        devices = topologies.get_topology_desc(f"{generation}:{shape}", "tpu", **together).devices
    except Exception as error:  # jaxlib has no public class for what libtpu refuses
        raise ConfigError(f"libtpu does not know the slice {generation}:{shape}: {error}") from error
    return Place(name, CHIPS[generation], devices, exact=True)


def names(generation: str) -> str:
    """The slices of a generation, in words."""
    shapes, cores = TPUS[generation]
    return f"{generation}-{{{','.join(str(n * cores) for n in shapes)}}}"


def gpu(name: str) -> Place:
    """GPUs such as gpu:80GB, h100 or h200x8, by their memory or by their name; a CPU stands in for them.

    It is to be called before JAX has looked for devices. Raises: ConfigError for another name.
    """
    found = re.fullmatch(r"(?:gpu:(\d+)GB|(\w+?))(?:x(\d+))?", name)
    memory, kind, count = found.groups() if found else (None, None, None)
    gpus = [kind for kind in CHIPS if CHIPS[kind].kind.startswith("NVIDIA")]
    if not (memory or kind in gpus):
        raise ConfigError(
            f"there is no device {name!r}: write gpu:80GB or {', '.join(gpus)}; h100x8 are eight"
        )
    unknown = Chip("", math.nan, int(memory or 0) * GB, math.nan, math.nan, "")
    count = int(count or 1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    return Place(name, CHIPS[kind] if kind else unknown, jax.devices()[:count], exact=False)
