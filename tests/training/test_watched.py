"""A run that is watched: a trace of a few of its steps, and figures at Weights & Biases."""

import signal
import sys
import types

import jax
import pytest
import tiny
from runs import batches, config, rows, start

import omnifusion_jax as of
from omnifusion_jax import shipped
from omnifusion_jax.config import CheckpointConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.evaluation.exact_match import Record
from omnifusion_jax.training.loop import train
from omnifusion_jax.training.monitor import Monitor
from omnifusion_jax.training.profile import Span
from omnifusion_jax.training.signals import Stop, Stopped
from omnifusion_jax.training.weights_and_biases import WeightsAndBiases


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name which keeps what it is given."""

    class Run:
        def __init__(self, **given):
            self.given, self.lines, self.finished = given, [], False
            fake.runs.append(self)

        def log(self, figures, step):
            self.lines.append((step, figures))

        def finish(self):
            self.finished = True

    fake = types.ModuleType("wandb")
    fake.runs, fake.init, fake.Error = [], Run, type("Error", (Exception,), {})
    fake.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


class Ends:
    """Batches during whose third one the run is asked to stop."""

    def __init__(self, given, stop):
        self.given, self.stop, self.count = given, stop, 0

    def __getattr__(self, name):
        return getattr(self.given, name)

    def __next__(self):
        self.count += 1
        if self.count == 3:
            self.stop.asked = signal.SIGTERM
        return next(self.given)


def traced(workdir):
    """The numbers of the steps in each trace, the oldest first."""
    found = []
    for file in sorted(
        workdir.glob("profile/plugins/profile/*/*.xplane.pb"), key=lambda f: f.stat().st_mtime
    ):
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        events = [event for plane in planes for line in plane.lines for event in line.events]
        steps = [dict(event.stats).get("step_num") for event in events if event.name == "train"]
        found.append(sorted(step for step in steps if step is not None))
    return found


def test_a_run_that_is_stopped_while_it_is_traced(tmp_path, capsys, wandb):
    """It traces the rest of the span when it goes on, and behind it nothing."""
    tokenizer = tiny.make_tokenizer(tmp_path / "words")
    workdir = tmp_path / "run"
    workdir.mkdir()
    c = config(steps=5, batch_size=2, checkpoint=CheckpointConfig(every_steps=0), wandb="adapters")
    with pytest.raises(Stopped), Stop() as stop:
        train(c, workdir, Ends(batches(tokenizer, c), stop), start(c), stop=stop, profile=Span(2, 4))
    assert traced(workdir) == [[2]]
    said = f"is in {workdir / 'profile'}; xprof and TensorBoard show it"
    assert f"the trace of steps 2 to 2 {said}" in capsys.readouterr().out
    train(c, workdir, batches(tokenizer, c), start(c), profile=Span(2, 4))
    assert traced(workdir) == [[2], [3, 4]]
    assert f"the trace of steps 3 to 4 {said}" in capsys.readouterr().out
    train(c, workdir, batches(tokenizer, c), start(c), profile=Span(2, 4))
    assert len(traced(workdir)) == 2
    assert "--profile=2:4: these steps are done, nothing is traced" in capsys.readouterr().out
    lines = [{"step": step, **figures} for run in wandb.runs for step, figures in run.lines]
    assert lines == rows(workdir) and [row["step"] for row in lines] == [1, 2, 3, 4, 5]
    assert [run.given["id"] for run in wandb.runs] == [wandb.runs[0].given["id"]] * 3


@pytest.mark.parametrize(
    ("text", "expected"), [("10:20", (10, 20)), ("7", (7, 7)), ("1:100", (1, 100)), ("100:100", (100, 100))]
)
def test_a_span(text, expected):
    assert Span.read(text).inside(100) == expected


@pytest.mark.parametrize("text", ["", "a", "10-20", "10:", ":20", "-3:4", "0:4", "20:10", "90:101", "1:2:3"])
def test_a_span_that_is_none(text):
    with pytest.raises(ConfigError, match=f"--profile={text}"):
        Span.read(text).inside(100)


def test_a_span_outside_of_the_run_is_refused_before_anything_is_done(tmp_path):
    c = shipped.load("tiny:sft")
    with pytest.raises(ConfigError, match=f"--profile=1:{c.steps + 1}: the run has the steps 1 to {c.steps}"):
        of.train(c, tmp_path / "run", profile=f"1:{c.steps + 1}")
    assert not (tmp_path / "run").exists()


def test_weights_and_biases_gets_what_tensorboard_gets(tmp_path, wandb):
    c = config(wandb="adapters")
    monitor = Monitor(tmp_path, 10, 0, 10, boards=[WeightsAndBiases(c, tmp_path)])
    monitor.log(5, {"train/loss": 2.5, "train/mfu": float("nan")})
    monitor.show(5, [Record((), "How many?", "two", "three")])
    (run,) = wandb.runs
    assert not run.finished
    monitor.close()
    table = ["question", "truth", "answer"], [["How many?", "two", "three"]]
    assert run.lines == [(5, {"train/loss": 2.5}), (5, {"samples": table})] and run.finished
    assert run.given["project"] == "adapters" and run.given["name"] == tmp_path.name
    assert run.given["config"]["batch_size"] == c.batch_size and run.given["resume"] == "allow"
    other = tmp_path / "other" / tmp_path.name
    other.mkdir(parents=True)
    WeightsAndBiases(c, tmp_path), WeightsAndBiases(c, other)
    ids = [run.given["id"] for run in wandb.runs]
    assert ids[0] == ids[1] != ids[2]  # a run by its workdir


def test_weights_and_biases_that_is_not_there_or_refuses(tmp_path, monkeypatch, wandb):
    def refuse(**given):
        raise wandb.Error("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"wandb=adapters: api_key not configured\. Log in"):
        WeightsAndBiases(config(wandb="adapters"), tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb=adapters: .* not installed.*pip install wandb"):
        WeightsAndBiases(config(wandb="adapters"), tmp_path)
