"""A plan as figures, for JSON, and as text."""

import collections
import math

from omnifusion_jax.config import TrainConfig
from omnifusion_jax.models.flops import sums
from omnifusion_jax.planning.compiled import Weighed, exchanged
from omnifusion_jax.planning.programs import Work
from omnifusion_jax.planning.search import Tried, with_rows
from omnifusion_jax.planning.topology import Place

GIB = 2**30


def figures(name: str, what: str, work: Work, place: Place, weighed: Weighed) -> dict:
    """Everything that a plan says; bytes, seconds and exchanges are those of one device and one step.

    A step of decoding is one token of every row. The bound is the time that a device needs at least for the
    one of three things that takes longest, if it does nothing else: its share of the floating-point
    operations at its peak, to read and write the program's arguments and results once, and to receive what
    others send.
    """
    chip, devices = place.chip, work.mesh.size
    received = sum(one.times * one.received for one in weighed.exchanges)
    bounds = {
        "compute": sum(work.flops.values()) / devices / chip.peak,
        "memory": weighed.moved / chip.bandwidth,
        "exchange": received / chip.links,
    }
    return {
        "config": name,
        "what": what,
        "place": place.name,
        "estimate": not place.exact,
        "devices": devices,
        "mesh": dict(work.mesh.shape),
        "rows": work.rows,
        "length": work.length,
        "fits": weighed.fits,
        "bytes": weighed.kinds,
        "total": weighed.memory,
        "memory": chip.memory,
        "exchanges": {
            f"{kind} {dtype}": sizes for (kind, dtype), sizes in exchanged(weighed.exchanges).items()
        },
        "received": received,
        "flops": sums(work.flops),
        "bounds": {kind: value for kind, value in bounds.items() if weighed.fits and math.isfinite(value)},
        "source": chip.source,
        "compile_seconds": weighed.seconds,
    }


def text(found: dict) -> str:
    """The figures of a plan as lines to read."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items())
    lines = [
        f"{found['what']} of {found['config']} on {found['place']} ({found['devices']} devices: {mesh})",
        f"{found['rows']} rows of {found['length']} tokens at a time",
        "",
        *memory_lines(found),
    ]
    if found["fits"]:
        lines += ["", *exchange_lines(found), "", *bound_lines(found)]
    lines += ["", f"compiled in {found['compile_seconds']:.0f} s"]
    if found["estimate"]:
        lines.append("An estimate: it was compiled for a CPU, whose buffers are not those of this device.")
    return "\n".join(lines)


def memory_lines(found):
    there, total = found["memory"] / GIB, found["total"] / GIB
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    rows = [f"  {kind:14} {size / GIB:8.3f}" for kind, size in found["bytes"].items()]
    if rows:
        rows.append(f"  {'by shapes':14} {sum(found['bytes'].values()) / GIB:8.3f}")
    return ["GiB a device", *rows, f"  {'as placed':14} {total:8.3f} of {there:.2f}: {verdict}"]


def exchange_lines(found):
    rows = [
        f"  {name:24} {times:6} times {size / GIB:9.3f}" for name, (times, size) in found["exchanges"].items()
    ]
    if not rows:
        return ["nothing is exchanged"]
    lines = ["exchanged a step, GiB that a device receives", *rows]
    return lines + ([f"  gradients are summed over devices in {summed(found)}"] if summed(found) else [])


def summed(found) -> str:
    """The dtypes that sums over devices have in a step, with the share of their bytes, most first."""
    sizes = collections.Counter()
    for name, (_, size) in found["exchanges"].items():
        kind, _, dtype = name.rpartition(" ")
        if "reduce" in kind and "f" in dtype and found["what"] == "step":
            sizes[dtype] += size
    return ", ".join(f"{dtype} ({size / sizes.total():.2%})" for dtype, size in sizes.most_common())


def bound_lines(found):
    parts = ", ".join(f"{part} {value / 1e12:.4g}" for part, value in found["flops"].items())
    lines = [f"TFLOP a step on all devices: {sum(found['flops'].values()) / 1e12:.5g} ({parts})"]
    if found["bounds"]:
        limits = ", ".join(f"{kind} {1000 * value:.1f}" for kind, value in found["bounds"].items())
        least = max(found["bounds"].values())
        lines.append(f"a step takes {1000 * least:.1f} ms at least (ms: {limits})")
        lines.append(f"  by {found['source']}")
    return lines


def tried_line(one: Tried, place: Place) -> str:
    """A line of a search."""
    sizes = f"{one.weighed.memory / GIB:7.2f} of {place.chip.memory / GIB:.2f} GiB"
    verdict = "fits" if one.weighed.fits else "does not fit"
    return f"remat={one.remat:5} {one.rows:3} rows a device: {sizes}, {verdict} ({one.weighed.seconds:.0f} s)"


def advice(chosen: Tried | None, config: TrainConfig, shards: int) -> str:
    """What a search found, as the flags to type."""
    if chosen is None:
        return "nothing fits: take more devices, a shorter data.max_length, or train less"
    best = with_rows(config, shards, chosen.rows)
    return (
        f"--config.remat={chosen.remat} --config.batch_size={best.batch_size} "
        f"--config.grad_accum={best.grad_accum}"
    )


def tried_figures(one: Tried) -> dict:
    """A try of a search, for JSON."""
    seconds = one.weighed.seconds
    found = {"remat": one.remat, "rows": one.rows, "fits": one.weighed.fits, "total": one.weighed.memory}
    return found | {"compile_seconds": seconds}
