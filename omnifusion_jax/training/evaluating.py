"""The evaluations of a run: when they are due, what they found, and which step was the best."""

import math
from collections.abc import Callable, Iterable

from omnifusion_jax import hosts
from omnifusion_jax.config import TrainConfig, check
from omnifusion_jax.training.lines import read_rows
from omnifusion_jax.training.monitor import Monitor

SAMPLES = 8  # questions whose answers are shown after every evaluation: always the same


class Evaluations:
    """Evaluates a run every `eval.every_steps` steps, and after its last one.

    Args:
      evaluate: from {path: parameter} to ({name: figure}, records), as an objective's `evaluator` gives it;
        None: nothing is evaluated.
    Attributes:
      figures, records: what the last evaluation gave, figures by the names under which they are logged.
    Raises: ConfigError, now or at the first evaluation, when nothing gives the figure that
      `checkpoint.keep_best` names.
    """

    def __init__(self, evaluate: Callable | None, config: TrainConfig):
        self.evaluate, self.every = evaluate, config.eval.every_steps
        self.figure = named(config.checkpoint.keep_best) if config.checkpoint.keep_best else ""
        check(
            evaluate is not None or not self.figure,
            "checkpoint.keep_best is set, and this run evaluates nothing: see eval.path and eval.count",
        )
        self.step, self.figures, self.records = 0, {}, []
        self.found = {}  # {step: the figure that says which is best}

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after `step` while it goes on."""
        return bool(self.evaluate and self.every and step and step % self.every == 0)

    def decides(self, step: int) -> bool:
        """Whether that evaluation may find `step` to be the best, so that its state must be on the disk."""
        return bool(self.figure) and self.due(step)

    def __call__(self, step: int, arrays: dict, monitor: Monitor):
        """Evaluates the parameters after `step`, unless that is done already, and logs what is new."""
        if self.evaluate is None or step == self.step:
            return
        figures, self.records = self.evaluate(arrays)
        self.figures, self.step = {named(name): value for name, value in figures.items()}, step
        check(
            not self.figure or self.figure in self.figures,
            f"checkpoint.keep_best needs {self.figure}; the evaluation gives {', '.join(self.figures)}",
        )
        self.remember([{"step": step, **self.figures}])
        if hosts.first() and not monitor.evaluated(step):
            monitor.log(step, self.figures)
            monitor.show(step, self.records[:SAMPLES])

    def resume(self, workdir):
        """Takes over what earlier starts of the run found."""
        self.remember(hosts.by_first(lambda: read_rows(workdir / "metrics.jsonl")))

    def remember(self, rows):
        """Takes the figure that counts from lines of metrics; one that is not finite is no figure."""
        self.found |= {
            row["step"]: row[self.figure] for row in rows if math.isfinite(row.get(self.figure, math.nan))
        }

    def best(self, steps: Iterable[int]) -> int | None:
        """The one of `steps` with the best figure, the first of equals; None when none has one."""
        better = -1 if self.figure.endswith("loss") else 1
        known = sorted(set(steps) & self.found.keys())
        return max(known, key=lambda step: better * self.found[step], default=None)


def named(name: str) -> str:
    """The name under which a figure of an evaluation is logged."""
    return f"eval/{name}"
