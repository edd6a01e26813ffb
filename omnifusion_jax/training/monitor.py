"""What a run says while it goes on: metrics.jsonl, TensorBoard, and one live line."""

import contextlib
import json
import math
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.summary import scalar

from omnifusion_jax.training.workdir import writing

COLUMNS = "loss {loss:.4f}  {tokens_per_s:,.0f} tok/s  {images_per_s:,.0f} img/s  input {input_wait:.0%}"


def read_rows(path):
    """The lines of a metrics.jsonl as dicts, without one that was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def resumed(path, start):
    """The file, opened for more lines, without those of steps after `start`, which a resumed run does again, and a line that was cut off."""
    kept = [row for row in read_rows(path) if row["step"] <= start]
    beside = path.with_suffix(".new")
    beside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    beside.replace(path)
    return open(path, "a", buffering=1, encoding="utf-8")


class Board:
    """Scalars for TensorBoard, written at once: a writer in a thread would wait for ever once the disk is full."""

    def __init__(self, directory):
        directory.mkdir(exist_ok=True)
        self.writer = EventsWriter(str(directory / "events"))

    def add(self, step, figures):
        for name, value in figures.items():
            self.writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self.writer.flush()

    def close(self):
        self.writer.close()


class Monitor:
    """Collects the scalars of each step and writes their figures every `every` steps, as `{"step": 10, "train/loss": 2.31, ...}`.

    The first step has a line of its own, with the loss before anything is learned. Figures of an interval: loss
    is the mean over its target tokens of finite steps (with `loss_mean_rows` that of the steps' means, each
    counted by its target tokens); input_wait the share of its time in which this process waited for data (the
    device may still have worked on the step before). Compilation, saving and evaluation are not in its time: see
    `pause`.

    Args:
      start: the step that the run goes on from; lines of later ones are removed.
      begun: what `interval()` gave at that step, or None.
    """

    def __init__(self, workdir, steps, start, every, begun=None):
        self.workdir, self.every, self.steps = workdir, every, steps
        with writing(workdir):
            self.file = resumed(workdir / "metrics.jsonl", start)
            self.board = Board(workdir / "tensorboard")
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
        if begun is not None:
            self.since, self.wait, self.sums = self.since - begun["seconds"], begun["wait"], begun["sums"]

    def interval(self):
        """What is collected since the last line, JSON-serialisable: a run that goes on from here writes the lines it would have written."""
        return {"seconds": time.perf_counter() - self.since, "wait": self.wait, "sums": self.sums}

    def reset(self):
        self.since, self.wait = time.perf_counter(), 0.0
        self.sums = {"loss": 0.0, "targets": 0.0, "tokens": 0.0, "images": 0.0}

    @contextlib.contextmanager
    def pause(self):
        """Time in here does not count."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - before

    def step(self, step, metrics):
        """Takes the metrics of the finished step `step` (numbers, not device arrays)."""
        broken = not math.isfinite(metrics["loss"])
        self.sums["loss"] += 0.0 if broken else metrics["loss"] * metrics["targets"]
        self.sums["targets"] += 0.0 if broken else metrics["targets"]
        for name in ("tokens", "images"):
            self.sums[name] += metrics[name]
        if step % self.every == 0 or step in (1, self.steps):
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
        figures = {
            name: value for name, value in figures.items() if math.isfinite(value)
        }  # JSON has no NaN: what was not finite is left out
        with writing(self.workdir):
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            self.board.add(step, figures)

    def evaluated(self, step):
        """Whether there is a line with figures of an evaluation after `step`."""
        rows = read_rows(self.workdir / "metrics.jsonl")
        return any(row["step"] == step and any(name.startswith("eval/") for name in row) for row in rows)

    def close(self):
        self.progress.stop()
        with writing(self.workdir):
            self.board.close()
            self.file.close()
