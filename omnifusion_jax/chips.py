"""Accelerators: what one chip can do at best, by the published figures of its maker."""

from typing import NamedTuple

from omnifusion_jax.tables import Table

GB, GIB = 10**9, 2**30


class Chip(NamedTuple):
    """The limits of a chip."""

    kind: str  # what `jax.Device.device_kind` begins with
    peak: float  # bfloat16 floating-point operations a second, dense
    memory: int  # bytes that programs may use
    bandwidth: float  # bytes a second between memory and chip
    links: float  # bytes a second that it can receive from its neighbours, over all links together
    source: str  # where the figures stand


TPU = "https://docs.cloud.google.com/tpu/docs/"
NVIDIA = "https://www.nvidia.com/en-us/data-center/"
# Google gives the bandwidth of links in both directions together, NVIDIA that of NVLink too: half of it here.
# The memory of TPUs is what the compiler (libtpu 0.0.42) leaves to programs of 16, 32 and 95 GB.
CHIPS = Table(
    "chip",
    rows={
        "v4": Chip("TPU v4", 275e12, int(30.75 * GIB), 1228e9, 300e9, TPU + "v4, arXiv 2304.01433 (links)"),
        "v5e": Chip("TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, TPU + "v5e"),
        "v5p": Chip("TPU v5", 459e12, int(95.74 * GIB), 2765e9, 600e9, TPU + "v5p"),
        "v6e": Chip("TPU v6 lite", 918e12, int(31.25 * GIB), 1640e9, 400e9, TPU + "v6e"),
        "a100": Chip("NVIDIA A100", 312e12, 80 * GB, 2039e9, 300e9, NVIDIA + "a100"),
        "h100": Chip("NVIDIA H100", 989e12, 80 * GB, 3350e9, 450e9, NVIDIA + "h100"),
        "h200": Chip("NVIDIA H200", 989e12, 141 * GB, 4800e9, 450e9, NVIDIA + "h200"),
    },
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a device by its `device_kind`; None for one that is not in the table."""
    found = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind), default=None)
