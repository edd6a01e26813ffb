"""What a run is measured by: floating-point operations, the peak of its devices, memory in use."""

import resource
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from omnifusion_jax.batch import Batch
from omnifusion_jax.chips import chip_of
from omnifusion_jax.config import TrainConfig
from omnifusion_jax.models import flops
from omnifusion_jax.tables import OBJECTIVES

PARTS = ("encoder", "adapter", "decoder", "head")
OWN = "objective/"  # what the names of an objective's own figures begin with


def operations(
    config: TrainConfig, trained: Mapping[str, Any], frozen: Mapping[str, Any], features: Collection[str] = ()
) -> Callable[[Batch], dict[str, jax.Array]]:
    """The function from a Batch to the floating-point operations of a step on it, {flops/PART: float32}.

    They are model FLOPs (models/flops.py), of all devices together. Padding and blank tiles do not count. Of
    an objective for which there is no formula the dict is empty.

    Args:
      trained, frozen: {path: array or shape}.
      features: streams whose media come as features of their encoders, which then do not run.
    """
    if not OBJECTIVES[config.objective].text:
        return lambda batch: {}
    c, shares = config.model, flops.trained_shares(config.model, trained, frozen)

    def of(batch):
        found = flops.sums(flops.step(c, flops.load(c, batch, features), shares))
        return {f"flops/{part}": found[part] for part in PARTS}

    return of


def peak(config: TrainConfig, mesh: Mesh, tell: Callable[[str], None]) -> float | None:
    """What the devices of a mesh can do at best together, in floating-point operations a second.

    The figure is that of bfloat16, whatever a run computes in. Where there is none, or no formula of what the
    run computes, it is None, and `tell` is called with a line that says so.
    """
    device = mesh.devices.flat[0].device_kind
    chip = chip_of(device)
    if not OBJECTIVES[config.objective].text:
        tell(f"train/mfu is not logged: models/flops.py has no formula for objective={config.objective}")
    elif chip is None:
        tell(f"train/mfu is not logged: chips.py has no peak of the device {device!r}")
    else:
        return chip.peak * mesh.size


def memory(devices: Iterable[jax.Device]) -> int:
    """Bytes that were in use at most so far, on the fullest of the devices.

    Devices that do not count, as CPUs, stand for the process: what it had in memory at most.
    """
    stats = [device.memory_stats() or {} for device in devices]
    counted = [of["peak_bytes_in_use"] for of in stats if "peak_bytes_in_use" in of]
    return max(counted, default=resident())


def resident() -> int:
    """Bytes that this process had in memory at most."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
