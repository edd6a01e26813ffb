"""python -m omnifusion_jax.train --config=CONFIG[:VARIANT] [--config.FIELD=value] --workdir=DIR

CONFIG is the name of a config that comes with the package (pretrain, sft, tiny, report/table4, ...),
or a file of your own that ends in .py.
"""

import shlex
import sys

from omnifusion_jax.cli import huge_pages

if __name__ == "__main__":  # before the libraries that follow are loaded, twice for nothing
    huge_pages.ensure("omnifusion_jax.train")

from absl import flags

from omnifusion_jax import hosts, run
from omnifusion_jax.changes import changes
from omnifusion_jax.cli import command
from omnifusion_jax.cli.overrides import ConfigFlags
from omnifusion_jax.config import check
from omnifusion_jax.hosts.company import BEAT, SILENCE
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

HOSTS = flags.DEFINE_string(
    "hosts",
    "",
    "Where the first of several hosts listens, ADDRESS:PORT. Not needed where they are found by themselves: "
    "on TPUs, in JobSets, and under Slurm or Open MPI (launch/README.md).",
)
HOST = flags.DEFINE_integer("host", None, "The number of this host, from 0; with --hosts.", lower_bound=0)
OF = flags.DEFINE_integer("of", None, "How many hosts there are; with --hosts.", lower_bound=1)
HOST_TIMEOUT = flags.DEFINE_float(
    "host_timeout",
    SILENCE,
    "Seconds without a sign of life after which a host counts as dead and the others end.",
    lower_bound=2 * BEAT,
)
TERM_STATUS = flags.DEFINE_integer(
    "term_status",
    0,
    "The exit status when SIGTERM has stopped the run. Kubernetes takes 0 for the end of the work, and would "
    "not start it again: JobSets use 75.",
    lower_bound=0,
    upper_bound=255,
)
REPLAY = flags.DEFINE_integer(
    "replay",
    None,
    "Train nothing: run this step of the run in the workdir again, and say which of its examples have a NaN "
    "or infinite loss or gradient. Nothing in the workdir is changed.",
)
PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Steps, FIRST:LAST, of which a trace for xprof and TensorBoard is written to the workdir's profile/.",
)


def main(_):
    """Returns the exit status.

    0: the run learned, or SIGTERM stopped it (--term_status); 130: Ctrl-C stopped it; 1: an error, or it
    learned nothing.
    """
    config = CONFIG.value
    config.validate()
    check(REPLAY.value is None or PROFILE.value is None, "--profile is for a run: --replay trains nothing")
    try:
        with hosts.started(HOSTS.value, HOST.value, OF.value, HOST_TIMEOUT.value):
            print(changes(config, CONFIG.file), f"All of it: {WORKDIR.value}/config.json", sep="\n")
            if REPLAY.value is not None:
                found = run.replay(config, WORKDIR.value, REPLAY.value, ALLOW_CHANGE.value)
                print(*found.lines(), sep="\n")
                return 0
            with Stop(hosts.count(), TERM_STATUS.value) as stop, watched():
                figures = run.train(config, WORKDIR.value, ALLOW_CHANGE.value, stop, PROFILE.value)
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
