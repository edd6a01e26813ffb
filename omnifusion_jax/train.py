"""python -m omnifusion_jax.train --config=configs/sft.py[:variant] [--config.a.b=value] --workdir=DIR"""

import shlex
import sys

from absl import flags
from ml_collections import config_flags

from omnifusion_jax import cli
from omnifusion_jax.config import to_json
from omnifusion_jax.models.presets import resolve
from omnifusion_jax.run import run
from omnifusion_jax.training.signals import Stop, Stopped

CONFIG = config_flags.DEFINE_config_file("config", None, "configs/NAME.py[:variant]")
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the finished model go; a run that was cut off goes on from there.")
ALLOW_CHANGE = flags.DEFINE_bool("allow_change", False, "Go on although settings that change what the run means are not those it was begun with.")


def main(_):
    """Exit status: 0 for a run that learned and for SIGTERM, 130 for Ctrl-C, 1 for an error or a run that learned nothing."""
    config = CONFIG.value
    config.model = resolve(config.model, config_flags.get_override_values(flags.FLAGS["config"]))
    config.validate()
    print(to_json(config))
    stop = Stop()
    try:
        with stop:
            figures = run(config, WORKDIR.value, ALLOW_CHANGE.value, stop)
    except Stopped:
        state = f"the state after step {stop.step} is saved" if stop.step else "no step was done, so that there is nothing to save"
        print(f"stopped by {stop.asked.name}: {state}. The same command goes on: {shlex.join(sys.orig_argv)}", flush=True)
        return stop.status
    problems = figures.pop("problems", [])
    for name, value in figures.items():
        print(f"{name:22} {value:.4f}" if isinstance(value, float) else f"{name:22} {value}")
    print(f"{WORKDIR.value}/model, {WORKDIR.value}/report.html", flush=True)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)
