"""A step that is run again: the same batch, the example that breaks it, and nothing changed on the disk."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose
from runs import Pictures, batches, config, rows, start

from omnifusion_jax.config import CheckpointConfig, MeshConfig
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.objectives.answers import Answers
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.bad_steps import NotFinite
from omnifusion_jax.training.lines import read_rows
from omnifusion_jax.training.loop import train
from omnifusion_jax.training.replay import Example, Replay, replay

POISON = "How many circles?"  # asked in one dialogue alone
PLACE = 37  # of that dialogue in the order: in the third of four steps an epoch
GAIN = "decoder/norm/scale"


class Fragile(Answers):
    """Where a row begins as the poisoned one does, the loss and the gradient of one parameter are NaN."""

    def __init__(self, tokenizer):
        self.words = jnp.array(tokenizer.encode(POISON))

    def loss(self, module, batch, key, remat):
        total, count = super().loss(module, batch, key, remat)
        n = len(self.words)
        windows = jnp.stack([jnp.roll(batch.tokens, -i, axis=1) for i in range(n)], axis=-1)
        poisoned = (windows == self.words).all(-1).any()
        return total + jnp.where(poisoned, jnp.nan, 0.0) * module.decoder.norm.scale[...].sum(), count


class Poisoned(Pictures):
    """One dialogue has another question, and no picture."""

    def __init__(self, index):
        self.index = index

    def __getitem__(self, i):
        if i == self.index:
            return Dialogue(f"pictures[{i}]", (("user", POISON), ("assistant", "There are two.")))
        return super().__getitem__(i)

    def where(self, i):
        return f"pictures.json:{i + 1}"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A run that a NaN in its third step has ended: (config, workdir, what makes its batches, the place)."""
    tokenizer, workdir = tiny.make_tokenizer(tmp_path_factory.mktemp("words")), tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setitem(OBJECTIVES, "fragile", Fragile(tokenizer))
    c = config(MeshConfig(2, 1), grad_accum=2, max_bad_steps=1, checkpoint=CheckpointConfig(every_steps=1))
    c.objective = "fragile"
    index = batches(tokenizer, c).order[PLACE]
    make = lambda: batches(tokenizer, c, Poisoned(index), pools=4)
    with pytest.raises(NotFinite, match="step 3: 1 steps had a NaN"):
        train(c, workdir, make(), start(c))
    yield c, workdir, make, f"pictures.json:{index + 1}"
    patch.undo()


def disk(workdir):
    """What there is, and when it was changed."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in workdir.rglob("*")}


def test_the_step_that_ended_a_run(broken):
    c, workdir, make, place = broken
    before = disk(workdir)
    found = replay(c, workdir, 3, make(), start(c))
    assert disk(workdir) == before
    assert math.isnan(found.loss) and len(found.examples) == c.batch_size
    bad = [example for example in found.examples if example.broken]
    assert [(example.places, example.broken) for example in bad] == [([place], [GAIN])]
    assert found.examples[PLACE - 32] is bad[0] and math.isnan(bad[0].loss)
    lines = list(found.lines())
    assert "step 3 again: loss nan" in lines[0] and "skipped" in lines[0]
    assert place in lines[1 + PLACE - 32] and "<- NaN" in lines[1 + PLACE - 32]
    assert lines[-1] == f"decoder: 1 of {found.parts['decoder']} gradients are NaN or infinite: {GAIN}"
    [line] = read_rows(workdir / "bad_steps.jsonl")
    assert line["step"] == 3 and line["parameters"] == [GAIN]
    assert line["rows"] == [example.places for example in found.examples]


def test_a_step_that_was_good_gives_the_loss_that_was_logged(broken, tmp_path):
    """From the checkpoint before it and from the start, to the bit; its examples alone add up to it."""
    c, workdir, make, _ = broken
    found = replay(c, workdir, 2, make(), start(c))
    assert [found.loss] == [row["train/loss"] for row in rows(workdir) if row["step"] == 2]
    assert replay(c, tmp_path, 2, make(), start(c)) == found and not list(tmp_path.iterdir())
    targets = np.array([example.targets for example in found.examples])
    losses = np.array([example.loss for example in found.examples])
    assert_allclose((losses * targets).sum() / targets.sum(), found.loss, rtol=1e-5)
    assert losses.std() > 1e-3 and not any(example.broken for example in found.examples)


def test_a_step_that_there_is_not(broken):
    c, workdir, make, _ = broken
    for step in (0, 7):
        with pytest.raises(ConfigError, match=f"no step {step} to replay: the run has 1 to 6"):
            replay(c, workdir, step, make(), start(c))


@pytest.mark.parametrize(
    ("loss", "grad_norm", "skipped"),
    [(1.5, 2.0, False), (1.5, math.inf, True), (math.nan, 2.0, True), (math.nan, math.nan, True)],
)
def test_what_is_skipped_is_said_whether_loss_or_gradient_is_at_fault(loss, grad_norm, skipped):
    first, *_, last = Replay(3, loss, grad_norm, {"decoder": 2}, [Example(["a:1"], 1.5, 4, [])]).lines()
    assert ("skipped" in first) == skipped
    assert last.startswith("No example does it alone") == skipped
