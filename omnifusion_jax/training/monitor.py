"""What a run reports while it goes on: metrics.jsonl, TensorBoard and other boards, and one live line."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from omnifusion_jax import hosts
from omnifusion_jax.training.board import Board
from omnifusion_jax.training.lines import read_rows, write_rows
from omnifusion_jax.training.meters import OWN, PARTS, resident
from omnifusion_jax.training.mirror import Mirror
from omnifusion_jax.training.samples import add_samples
from omnifusion_jax.training.workdir import writing

COLUMNS = "loss {loss:.4f}  {tokens_per_s:,.0f} tok/s  {images_per_s:,.0f} img/s  input {input_wait:.0%}"
MFU = "  mfu {mfu:.1%}"
SUMMED = ("tokens", "images", *(f"flops/{part}" for part in PARTS))


def resumed(path: Path, start: int):
    """Opens a metrics.jsonl for more lines, and first removes those that a resumed run writes again.

    These are the lines of steps after `start`, and a last line that was cut off.
    """
    write_rows(path, [row for row in read_rows(path) if row["step"] <= start])
    return open(path, "a", buffering=1, encoding="utf-8")


def own(name: str) -> bool:
    """Whether a metric is one of the objective's own figures."""
    return name.startswith(OWN)


class Monitor:
    """Collects the scalars of each step, and writes a line of figures every `every` steps.

    A line of metrics.jsonl is `{"step": 10, "train/loss": 2.31, ...}`. The first step has a line of its own,
    with the loss before anything is learned. Figures of an evaluation have lines of their own. Each of the
    others covers the interval since the one before it:

    - loss: the mean over the target tokens of its finite steps (with `loss_mean_rows` the mean of the steps'
      losses, each weighted by its number of target tokens);
    - input_wait: the share of its time in which this process waited for data (the device may still have been
      working on the step before);
    - mfu, and mfu/PART, which add up to it: model FLOPs a second as a share of the peak of all devices
      (docs/performance.md); left out where the peak is not known.

    Two figures look further back: memory (bytes that were in use at most so far), and goodput (the share of
    the time since the run first had its model loaded, restarts and what lay between them included, that went
    into steps which count: neither skipped nor done again after a restart).

    Compilation, saving and evaluation do not count as its time: see `pause`. Of several hosts only the first
    writes; its `input_wait` includes waiting for the data of the others.

    Args:
      steps: the number of steps of the whole run.
      start: the step that the run goes on from; lines of later steps are removed.
      begun: what `interval()` gave at that step, or None.
      peak: floating-point operations a second of all devices at best; None: it is not known.
      memory: gives the figure of that name.
      boards: to which figures are written besides, with the methods of board.Board.
    """

    def __init__(
        self,
        workdir: Path,
        steps: int,
        start: int,
        every: int,
        begun: dict | None = None,
        peak: float | None = None,
        memory: Callable[[], int] = resident,
        boards: Sequence = (),
    ):
        self.workdir, self.every, self.steps, self.peak, self.memory = workdir, every, steps, peak, memory
        if hosts.first():
            with writing(workdir):
                self.mirror = Mirror(workdir, "metrics.jsonl", "samples.jsonl")
                self.file = resumed(self.mirror.here / "metrics.jsonl", start)
                self.boards = [Board(self.mirror.here / "tensorboard"), *boards]
        self.console = Console()
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.task = self.progress.add_task("compiling", total=steps, completed=start)
        self.progress.start()
        self.born, self.counted = time.time(), 0.0
        self.reset()
        if begun is not None:
            self.since, self.wait, self.sums = self.since - begun["seconds"], begun["wait"], begun["sums"]
            self.born, self.counted, self.seen = begun["born"], begun["counted"], begun["seconds"]

    def interval(self) -> dict:
        """What was collected since the last line, JSON-serialisable.

        Given as `begun` to a resumed run, it makes that run write the same lines as an uninterrupted one.
        """
        seconds = time.perf_counter() - self.since
        lasting = {"born": self.born, "counted": self.counted}
        return {"seconds": seconds, "wait": self.wait, "sums": self.sums, **lasting}

    def reset(self):
        self.since, self.wait, self.seen = time.perf_counter(), 0.0, 0.0
        self.sums = dict.fromkeys(("loss", "targets", *SUMMED), 0.0)

    @contextlib.contextmanager
    def pause(self):
        """Excludes the time in this context from the interval."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - before

    def step(self, step: int, metrics: Mapping[str, float], counts: Mapping[str, int]):
        """Takes the metrics of the finished step `step`, as numbers, and what its data counted."""
        seconds, skipped = time.perf_counter() - self.since, not math.isfinite(metrics["grad_norm"])
        broken = not math.isfinite(metrics["loss"])
        self.counted += 0.0 if broken or skipped else seconds - self.seen
        self.seen = seconds
        self.sums["loss"] += 0.0 if broken else metrics["loss"] * metrics["targets"]
        self.sums["targets"] += 0.0 if broken else metrics["targets"]
        for name in SUMMED:
            self.sums[name] += metrics.get(name, 0.0)  # an objective may have no formula of its FLOPs
        for name in () if broken else filter(own, metrics):
            self.sums[name] = self.sums.get(name, 0.0) + metrics[name] * metrics["targets"]
        if step % self.every == 0 or step in (1, self.steps):
            self.write(step, metrics, counts)

    def write(self, step, metrics, counts):
        seconds = max(time.perf_counter() - self.since, 1e-9)
        rate = lambda name: self.sums[name] / seconds
        used = {f"mfu/{part}": rate(f"flops/{part}") / self.peak if self.peak else math.nan for part in PARTS}
        figures = {
            "loss": self.sums["loss"] / self.sums["targets"] if self.sums["targets"] else math.nan,
            "tokens_per_s": rate("tokens"),
            "images_per_s": rate("images"),
            "input_wait": self.wait / seconds,
            "mfu": sum(used.values()),
            **used,
            "memory": self.memory(),
            "goodput": self.counted / max(time.time() - self.born, 1e-9),
            "grad_norm": metrics["grad_norm"],
            "bad_steps": metrics["bad"],
        }
        for name in filter(own, self.sums):  # of steps that count, so that there are targets
            figures[name.removeprefix(OWN)] = self.sums[name] / self.sums["targets"]
        of_data = {f"data/{name}": value for name, value in counts.items()}
        self.log(step, {f"train/{name}": value for name, value in figures.items()} | of_data)
        line = (COLUMNS + MFU if self.peak else COLUMNS).format(**figures)
        self.progress.update(self.task, completed=step, description=line)
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps}  {line}")
        self.reset()

    def log(self, step: int, figures: Mapping[str, float]):
        """Writes the finite figures (JSON has no NaN) as one line, and to TensorBoard."""
        if not hosts.first():
            return
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        with writing(self.workdir):
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            for board in self.boards:
                board.add(step, figures)
            self.mirror.grown()

    def keep(self):
        """Sees to it that all lines are in the workdir, before a checkpoint of their step is."""
        if hosts.first():
            with writing(self.workdir):
                self.mirror.copy()

    def show(self, step: int, records: Sequence):
        """Writes what was answered to a few questions, evaluation.exact_match.Records, after `step`."""
        if records:
            with writing(self.workdir):
                add_samples(self.mirror.here / "samples.jsonl", step, records)
                for board in self.boards:
                    board.show(step, records)

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl has the figures of an evaluation after `step`."""
        rows = read_rows(self.mirror.here / "metrics.jsonl")
        return any(row["step"] == step and any(name.startswith("eval/") for name in row) for row in rows)

    def close(self):
        self.progress.stop()
        if not hosts.first():
            return
        with writing(self.workdir):
            for board in self.boards:
                board.close()
            self.file.close()
            self.mirror.close()
