"""What a run says while it goes on: metrics.jsonl, TensorBoard, and one live line."""

import contextlib
import json
import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

COLUMNS = "loss {loss:.4f}  {tokens_per_s:,.0f} tok/s  {images_per_s:,.0f} img/s  input {input_wait:.0%}"


def resumed(path, start):
    """The file, opened for more lines, without those of steps after `start`, which a resumed run does again, and a line that was cut off."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= start]
    beside = path.with_suffix(".new")
    beside.write_text("".join(line + "\n" for line in kept))
    beside.replace(path)
    return open(path, "a", buffering=1)


class Monitor:
    """Collects the scalars of each step and writes their figures every `every` steps, as `{"step": 10, "train/loss": 2.31, ...}`.

    Figures of an interval: loss is the mean over its target tokens of finite steps; input_wait the share of its time in which this process waited for
    data (the device may still have worked on the step before). Compilation, saving and evaluation are not in its time: see `pause`.
    """

    def __init__(self, workdir, steps, start, every):
        self.file = resumed(workdir / "metrics.jsonl", start)
        self.board = SummaryWriter(str(workdir / "tensorboard"))
        self.every, self.steps = every, steps
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
        self.reset()

    def reset(self):
        self.since, self.wait = time.perf_counter(), 0.0
        self.sums = {"loss": 0.0, "targets": 0.0, "tokens": 0.0, "images": 0.0}

    @contextlib.contextmanager
    def pause(self):
        """Time in here does not count."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before

    def step(self, step, metrics):
        """Takes the metrics of the finished step `step` (numbers, not device arrays)."""
        broken = not math.isfinite(metrics["loss"])
        self.sums["loss"] += 0.0 if broken else metrics["loss"] * metrics["targets"]
        self.sums["targets"] += 0.0 if broken else metrics["targets"]
        for name in ("tokens", "images"):
            self.sums[name] += metrics[name]
        if step % self.every == 0 or step == self.steps:
            self.write(step, metrics)

    def write(self, step, metrics):
        seconds = max(time.perf_counter() - self.since, 1e-9)
        figures = {
            "loss": self.sums["loss"] / self.sums["targets"] if self.sums["targets"] else math.nan,
            "tokens_per_s": self.sums["tokens"] / seconds,
            "images_per_s": self.sums["images"] / seconds,
            "input_wait": self.wait / seconds,
            "grad_norm": metrics["grad_norm"],
            "bad_steps": metrics["bad"],
        }
        self.log(step, {f"train/{name}": value for name, value in figures.items()})
        self.progress.update(self.task, completed=step, description=COLUMNS.format(**figures))
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.steps}  {COLUMNS.format(**figures)}")
        self.reset()

    def log(self, step, figures):
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}  # JSON has no NaN: what was not finite is left out
        self.file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(name, value, step)

    def close(self):
        self.progress.stop()
        self.board.close()
        self.file.close()
