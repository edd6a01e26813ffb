"""Writes docs/plans.md: python examples/plans.py > docs/plans.md

Each cell is a plan, compiled in a process of its own, which takes half a minute. What is found is kept in
docs/plans.json, from which an interrupted run goes on: remove it to begin anew. With --minutes=30 no cell is
begun after half an hour, and those that are missing have a dash.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

from omnifusion_jax import shipped
from omnifusion_jax.config import TrainConfig

PLACES = ("v5e-16", "v5e-256", "v4-32", "v5p-16", "v5p-256", "v6e-16", "v6e-256")
FIRST = ("sft", "pretrain", "sft_lora")  # are compiled on every slice before others are on any
KEPT = Path(__file__).parents[1] / "docs" / "plans.json"
TOP = """# Plans

Written by `python examples/plans.py > docs/plans.md`: every shipped config of 3 to 13 billion parameters,
compiled for slices of TPU chips on a machine without one. A cell has the GiB that a chip needs for one row
at a time (2048 tokens; 4096 of `grid`), with the whole step, optimizer included, and everything spread over
`fsdp`; in brackets, the least time that a step can take, which is what the slowest of computing, memory and
exchange needs. **no** stands where it does not fit. The batch is that of the config, or one row for every
chip of a slice that is larger. `python -m omnifusion_jax.plan` says it in full ([training.md](training.md)).

How to read a name: `CONFIG:VARIANT`, as `--config` takes it. Cells with a dash are not compiled yet.
"""
PHASES = (("Phase 1", False), ("Phase 2", True))


def configs() -> dict[str, TrainConfig]:
    """The shipped configs of whole models, by name."""
    names = [
        f"{name}:{variant}".rstrip(":")
        for name in shipped.names()
        for variant in shipped.module(name).VARIANTS
    ]
    found = {name: shipped.load(name) for name in names}
    return {name: config for name, config in found.items() if config.model.decoder.width >= 2048}


def program(config: TrainConfig) -> str:
    """What the compiled step depends on: configs that differ in other things share their cells."""
    model = dataclasses.asdict(config.model)
    for name in ("preset", "filled_from", "prompt", "user", "bot", "template"):
        model.pop(name)
    optimizer = config.optimizer.name, config.optimizer.clip
    size = config.batch_size, bool(config.loss_mean_rows), config.data.max_length, config.data.packing
    factors = dataclasses.astuple(config.lora)
    found = [config.objective, model, optimizer, size, config.train_parts, config.remat, factors]
    return json.dumps(found)


def second(config: TrainConfig) -> bool:
    """Whether a config is of the second phase, which trains the decoder, or factors beside its kernels."""
    return config.checkpoint.final == "complete" or config.lora.rank > 0


def plan(name: str, place: str) -> dict:
    """The figures of a cell."""
    out = KEPT.with_suffix(".cell")
    command = [sys.executable, "-m", "omnifusion_jax.plan", f"--config={name}", f"--topology={place}"]
    done = subprocess.run([*command, "--rows=1", f"--json={out}"], capture_output=True, text=True)
    if done.returncode not in (0, 1):
        sys.exit(f"{name} on {place}: {done.stderr[-2000:]}")
    found = json.loads(out.read_text())
    out.unlink()
    return {key: found[key] for key in ("fits", "total", "bounds", "received", "compile_seconds")}


def cell(found: dict | None) -> str:
    if found is None:
        return "-"
    size = f"{found['total'] / 2**30:.1f}"
    if not found["fits"]:
        return f"**no**, {size}"
    return f"{size} ({max(found['bounds'].values()):.2g} s)"


def main(minutes: float):
    there = configs()
    first = {}  # of the configs with one program, the first
    for name, config in there.items():
        first.setdefault(program(config), name)
    same = {name: first[program(config)] for name, config in there.items()}
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    end = time.monotonic() + 60 * minutes
    later = [name for name in first.values() if name not in map(same.get, FIRST)]
    for names in ([same[name] for name in FIRST], later):
        for place, name in itertools.product(PLACES, names):
            key = f"{name} {place}"
            if key not in kept and time.monotonic() < end:
                kept[key] = plan(name, place)
                KEPT.write_text(json.dumps(kept, indent=1) + "\n")
                print(f"{key}: {cell(kept[key])}", file=sys.stderr, flush=True)
    print(TOP)
    for title, later in PHASES:
        print(f"## {title}\n\n| config | {' | '.join(PLACES)} |\n|---{'|---' * len(PLACES)}|")
        for name, config in there.items():
            if second(config) == later:
                cells = [cell(kept.get(f"{same[name]} {place}")) for place in PLACES]
                print(f"| {name} | {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    main(parser.parse_args().minutes)
