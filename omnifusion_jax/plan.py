"""python -m omnifusion_jax.plan --config=CONFIG --topology=v5e-16 [--what=step|prefill|decode] [--search]

Compiles what a run executes for devices that are not there, and says what it takes of each: bytes by kind,
what devices exchange, floating-point operations, and the time that a step takes at least. TPU slices need
the compiler for TPUs, pip install 'jax[tpu]'; for GPUs (--device=gpu:80GB) sizes are estimated on a CPU.

Exit status: 0, it fits; 1, it does not; 2, the command is wrong.
"""

import functools
import json
from pathlib import Path

import jax
from absl import flags

from omnifusion_jax.cli import command
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.config import check
from omnifusion_jax.planning import early, report, topology
from omnifusion_jax.planning.compiled import weigh
from omnifusion_jax.planning.programs import WHAT
from omnifusion_jax.planning.search import best, search, with_rows
from omnifusion_jax.sharding import make_mesh, ways

CONFIG = ConfigFlags()
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice: v4-32, v5e-16, v5p-256, v6e-256, v5e:4x4, ...")
DEVICE = flags.DEFINE_string("device", None, "GPUs instead: gpu:80GB, h100, h200x8 (eight); an estimate.")
PROGRAM = flags.DEFINE_enum(
    "what", "step", list(WHAT), "What is compiled: the training step, or what answers."
)
ROWS = flags.DEFINE_integer("rows", None, "Rows of a device at a time; sets grad_accum.", lower_bound=1)
SEARCH = flags.DEFINE_bool("search", False, "Look for the most rows and the cheapest remat that fit.")
JSON = flags.DEFINE_string("json", None, "File for the figures.")


def main(_):
    check((TOPOLOGY.value is None) != (DEVICE.value is None), "give --topology=v5e-16, or --device=gpu:80GB")
    check(not SEARCH.value or PROGRAM.value == "step", "--search looks for a training step that fits")
    jax.config.update("jax_platforms", "cpu")
    written = early.listen() if TOPOLOGY.value else None
    place = topology.tpu(TOPOLOGY.value) if TOPOLOGY.value else topology.gpu(DEVICE.value)
    config = CONFIG.value.validate()
    mesh = make_mesh(**vars(config.mesh), devices=place.devices)
    compiled = functools.partial(weigh, place=place, written=written)
    found = (look if SEARCH.value else plan)(config, mesh, place, compiled)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(found, indent=2) + "\n")
    status = 0 if found["fits"] else 1
    return early.leave(written, status) if written else status


def plan(config, mesh, place, compiled) -> dict:
    """Compiles one program, prints its plan and returns its figures."""
    if ROWS.value:
        config = with_rows(config, ways(mesh, "batch"), ROWS.value)
    work = WHAT[PROGRAM.value](config, mesh)
    found = report.figures(CONFIG.source.value, PROGRAM.value, work, place, compiled(work))
    print(report.text(found), flush=True)
    return found


def look(config, mesh, place, compiled) -> dict:
    """Prints what fits and what does not, and returns all tries with the best."""
    tried, shards = [], ways(mesh, "batch")
    for one in search(config, shards, lambda c: compiled(WHAT["step"](c, mesh))):
        tried.append(one)
        print(report.tried_line(one, place), flush=True)
    chosen = best(tried)
    print(report.advice(chosen, config, shards), flush=True)
    return {"fits": chosen is not None, "tried": list(map(report.tried_figures, tried))}


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    command.run(main, CONFIG, failed=2)
