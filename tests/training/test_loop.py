"""The loop: accumulation, meshes, freezing, broken losses, resuming."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from omnifusion_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.layout import Layout
from omnifusion_jax.data.pipeline import Batches, LayOut
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.training.loop import NotFinite, train
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.parts import split

LENGTH = 80
PHASE1 = ((r"(adapter|special)/.*", 1.0), (r"(encoders|decoder)/.*", None))
PHASE2 = ((r"(adapter|special|decoder)/.*", 1.0), (r"encoders/.*", None))


class Pictures:
    """Random pictures with one of a few answers; every fourth dialogue has none."""

    def __len__(self):
        return 64

    def __getitem__(self, i):
        rng = np.random.default_rng(i)
        picture = (rng.integers(0, 256, (24, 24, 3), np.uint8),) if i % 4 else ()
        answer = " and ".join(["a red circle", "a blue square"][: 1 + i % 2])
        return Dialogue(f"pictures[{i}]", (("user", "What is in the picture?"), ("assistant", answer)), picture)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def config(mesh=None, dropout=0.0, **settings):
    settings = {"steps": 6, "batch_size": 16, "train_parts": PHASE2, "compute_dtype": "float32", "log_every": 1, **settings}
    c = TrainConfig(
        model=tiny.config(),
        mesh=mesh or MeshConfig(data=1, fsdp=1),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup=0.0),
        data=DataConfig(path="pictures"),
        **settings,
    )
    c.model.adapter.dropout = dropout
    c.model.decoder.window = 64  # so that an answer sees every special vector
    return c.validate()


def batches(tokenizer, c):
    layout = Layout(tokenizer, c.model.prompt, "omnifusion", c.model.encoder.rows, LENGTH)
    return Batches(Pictures(), LayOut(layout, 24), batch_size=c.batch_size, length=LENGTH, size=24, seed=c.seed)


def start(c):
    return tiny.arrays(c.model, "encoders", "adapter", "special", "decoder")


def losses(workdir):
    return [json.loads(line)["train/loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def fit(c, tokenizer, workdir, given=None, wrap=lambda b: b):
    workdir.mkdir(exist_ok=True)
    trained, frozen = train(c, workdir, wrap(batches(tokenizer, c)), start(c) if given is None else given)
    return losses(workdir), jax.device_get(trained), jax.device_get(frozen)


@pytest.fixture(scope="module")
def reference(tokenizer, tmp_path_factory):
    return fit(config(), tokenizer, tmp_path_factory.mktemp("reference"))


def test_it_learns_and_leaves_frozen_parts_alone(reference):
    curve, trained, frozen = reference
    assert curve[-1] < 0.8 * curve[0]
    given = start(config())
    assert set(frozen) == {path for path in given if path.startswith("encoders/")}
    for path, a in frozen.items():
        assert_array_equal(a, given[path])
    assert not [path for path, a in trained.items() if np.abs(a - given[path]).max() == 0]


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_is_exact(reference, tokenizer, tmp_path, accumulate):
    curve, _, _ = fit(config(grad_accum=accumulate), tokenizer, tmp_path)
    assert_allclose(curve, reference[0], rtol=1e-5)


@pytest.mark.parametrize("mesh", [(8, 1), (1, 8), (2, 4), (4, 2)])
def test_every_mesh_gives_the_same_losses(reference, tokenizer, tmp_path, mesh):
    curve, _, _ = fit(config(MeshConfig(*mesh)), tokenizer, tmp_path)
    assert_allclose(curve, reference[0], rtol=1e-5)


def test_accumulation_over_a_mesh(reference, tokenizer, tmp_path):
    curve, _, _ = fit(config(MeshConfig(2, 4), grad_accum=2), tokenizer, tmp_path)
    assert_allclose(curve, reference[0], rtol=1e-5)


def test_frozen_parts_have_no_optimizer_state(tokenizer, tmp_path):
    c = config(train_parts=PHASE1)
    trained, frozen = split(PHASE1, start(c))
    state = make_optimizer(c.optimizer, c.steps, PHASE1).init(trained)
    moments = sum(a.size for a in jax.tree.leaves(state) if a.ndim)
    assert moments == 2 * sum(a.size for a in trained.values()) and len(frozen) > len(trained)


def test_resume_continues_the_same_curve(tokenizer, tmp_path):
    """With dropout, whose keys follow from the step, and on another mesh."""
    whole, expected, _ = fit(config(dropout=0.2), tokenizer, tmp_path / "whole")
    cut = tmp_path / "cut"

    class Interrupted(Exception):
        pass

    class Ends:
        """Batches that end after four."""

        def __init__(self, inner):
            self.inner, self.given = inner, 0
            self.state, self.restore = inner.state, inner.restore

        def __next__(self):
            if self.given == 4:
                raise Interrupted
            self.given += 1
            return next(self.inner)

    c = config(dropout=0.2, checkpoint=CheckpointConfig(every_steps=3))
    with pytest.raises(Interrupted):
        fit(c, tokenizer, cut, wrap=Ends)
    curve, trained, _ = fit(c, tokenizer, cut)
    assert curve == whole
    for path, a in trained.items():
        assert_array_equal(a, expected[path])


def test_resume_on_another_mesh(reference, tokenizer, tmp_path):
    c = config(MeshConfig(1, 8), checkpoint=CheckpointConfig(every_steps=3), steps=6)
    fit(c, tokenizer, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    curve, _, _ = fit(config(MeshConfig(4, 2)), tokenizer, tmp_path)
    assert_allclose(curve, reference[0], rtol=1e-5)


def test_another_models_checkpoint_is_refused(tokenizer, tmp_path):
    fit(config(steps=1), tokenizer, tmp_path)
    with pytest.raises(CheckpointError, match="fresh --workdir"):
        fit(config(steps=2, train_parts=PHASE1), tokenizer, tmp_path)


def poisoned(step):
    """Batches whose `step`-th has weights that make the loss NaN."""

    class Poisoned:
        def __init__(self, inner):
            self.inner, self.n = inner, 0
            self.state, self.restore = inner.state, inner.restore

        def __next__(self):
            self.n += 1
            batch = next(self.inner)
            return batch._replace(weights=batch.weights * np.float32("nan")) if step(self.n) else batch

    return Poisoned


def test_a_broken_loss_skips_the_update_and_is_counted(tokenizer, tmp_path):
    _, after, _ = fit(config(steps=3), tokenizer, tmp_path / "three", wrap=poisoned(lambda n: n == 3))
    rows = [json.loads(line) for line in (tmp_path / "three" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/bad_steps"] for row in rows] == [0, 0, 1]
    assert all(np.isfinite(a).all() for a in after.values())
    # a cosine of two steps is not that of three: compare with a constant rate
    c = {"steps": 2}, {"steps": 3}
    kept = []
    for i, settings in enumerate(c):
        this = config(**settings)
        this.optimizer.schedule = "constant"
        kept.append(fit(this, tokenizer, tmp_path / f"constant{i}", wrap=poisoned(lambda n: n == 3))[1])
    for path, a in kept[0].items():
        assert_array_equal(a, kept[1][path])


def test_too_many_broken_losses_stop_the_run(tokenizer, tmp_path):
    with pytest.raises(NotFinite, match="learning_rate"):
        fit(config(max_bad_steps=3), tokenizer, tmp_path, wrap=poisoned(lambda n: True))
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3


def test_adafactor_and_bfloat16_run(tokenizer, tmp_path):
    c = config(compute_dtype="bfloat16", remat="full", steps=8)
    c.optimizer.name, c.optimizer.learning_rate = "adafactor", 1e-2
    curve, trained, frozen = fit(c, tokenizer, tmp_path)
    assert curve[-1] < curve[0]
    assert {a.dtype.name for a in trained.values()} == {"float32"} and {a.dtype.name for a in frozen.values()} == {"bfloat16"}


def test_metrics_are_there(reference, tokenizer, tmp_path):
    fit(config(steps=2), tokenizer, tmp_path)
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 2
    assert {"train/loss", "train/tokens_per_s", "train/images_per_s", "train/input_wait", "train/grad_norm"} <= set(row)
    assert any((tmp_path / "tensorboard").iterdir())
