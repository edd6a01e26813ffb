"""python -m omnifusion_jax.train --config=CONFIG[:VARIANT] [--config.FIELD=value] --workdir=DIR

CONFIG is the name of a config that comes with the package (pretrain, sft, tiny, report/table4, ...),
or a file of your own that ends in .py.
"""

import shlex
import sys

from absl import flags

from omnifusion_jax import run
from omnifusion_jax.changes import changes
from omnifusion_jax.cli import command
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.training.preemption import watched
from omnifusion_jax.training.signals import Stop, Stopped

CONFIG = ConfigFlags()
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints, metrics and the finished model go; a run that was cut off goes on from there.",
)
ALLOW_CHANGE = flags.DEFINE_bool(
    "allow_change",
    False,
    "Go on although settings that change what the run means are not those it was begun with.",
)

REPLAY = flags.DEFINE_integer(
    "replay",
    None,
    "Train nothing: run this step of the run in the workdir again, and say which of its examples have a NaN "
    "or infinite loss or gradient. Nothing in the workdir is changed.",
)


def main(_):
    """Returns the exit status.

    0: the run learned, or SIGTERM stopped it; 130: Ctrl-C stopped it; 1: an error, or it learned nothing.
    """
    config = CONFIG.value
    config.validate()
    print(changes(config, CONFIG.file), f"All of it: {WORKDIR.value}/config.json", sep="\n")
    if REPLAY.value is not None:
        print(*run.replay(config, WORKDIR.value, REPLAY.value, ALLOW_CHANGE.value).lines(), sep="\n")
        return 0
    stop = Stop()
    try:
        with stop, watched():
            figures = run.train(config, WORKDIR.value, ALLOW_CHANGE.value, stop)
    except Stopped:
        state = f"the state after step {stop.step} is saved" if stop.step else "there is nothing new to save"
        print(
            f"stopped by {stop.asked.name}: {state}. The same command goes on: {shlex.join(sys.orig_argv)}",
            flush=True,
        )
        return stop.status
    problems = figures.pop("problems", [])
    for name, value in figures.items():
        print(f"{name:22} {value:.4f}" if isinstance(value, float) else f"{name:22} {value}")
    written = ("model", "best", "report.html") if "best/step" in figures else ("model", "report.html")
    print(", ".join(f"{WORKDIR.value}/{name}" for name in written), flush=True)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main, CONFIG)
