"""The loop: accumulation, meshes, freezing, broken losses, resuming."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

from omnifusion_jax.batch import Batch
from omnifusion_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.layout import Layout, Prepare
from omnifusion_jax.data.pictures import Lens
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.nn import nnx
from omnifusion_jax.training.loop import NotFinite, train
from omnifusion_jax.training.monitor import resumed
from omnifusion_jax.training.objectives import OBJECTIVES
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.parts import split
from omnifusion_jax.training.step import init_state, make_step

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
        data=DataConfig(path="pictures", max_length=LENGTH),
        **settings,
    )
    c.model.adapter.dropout = dropout
    c.model.decoder.window = 64  # so that an answer sees every special vector
    return c.validate()


def batches(tokenizer, c):
    prepare = Prepare(Layout(tokenizer, c.model, LENGTH), Lens(c.model))
    return Batches(Pictures(), prepare, batch_size=c.batch_size, length=LENGTH, sizes=(24,), seed=c.seed)


def start(c):
    return tiny.arrays(c.model, "encoders", "adapter", "special", "decoder")


def losses(workdir):
    return [json.loads(line).get("train/loss") for line in (workdir / "metrics.jsonl").read_text().splitlines()]


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


def test_the_mean_of_the_means_of_rows(reference, tokenizer, tmp_path):
    """Another loss than the mean over all targets, since answers differ in length."""
    curve, _, _ = fit(config(steps=1, loss_mean_rows=1), tokenizer, tmp_path)
    assert abs(curve[0] - reference[0][0]) > 1e-3


def test_frozen_parts_have_no_optimizer_state(tokenizer, tmp_path):
    """In the checkpoint that a run leaves: two moments for what is trained, nothing else."""
    _, trained, frozen = fit(config(steps=1, train_parts=PHASE1), tokenizer, tmp_path)
    with ocp.CheckpointManager(tmp_path / "checkpoints", item_names=("state", "data")) as manager:
        saved = manager.restore(1, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    sizes = lambda tree: sum(a.size for a in jax.tree.leaves(tree) if a.ndim)
    assert set(saved["params"]) == set(trained) and not set(trained) & set(frozen)
    assert sizes(saved["optimizer"]) == 2 * sizes(trained)


def flops(c):
    """Of the compiled step, as the compiler counts them: a scan's body once, which is the same for all."""
    objective = OBJECTIVES["answers"]
    skeleton = nnx.eval_shape(lambda: objective.module(c.model, rngs=nnx.Rngs(0)))
    trained, frozen = split(c.train_parts, nnx.parameters(skeleton))
    optimizer = make_optimizer(c.optimizer, c.steps, c.train_parts)
    state = jax.eval_shape(lambda p: init_state(optimizer, p), trained)
    plane = lambda dtype, *shape: jax.ShapeDtypeStruct((c.batch_size, *shape), dtype)
    integers = plane(np.int32, LENGTH)
    batch = Batch(integers, integers, integers, plane(np.float32, LENGTH), integers, integers, (plane(np.uint8, 1, 24, 24, 3),))
    step = make_step(skeleton, objective, optimizer, seed=0, grad_accum=1, dtype=np.dtype("float32"), remat="none")
    return jax.jit(step).lower(state, frozen, batch).compile().cost_analysis()["flops"]


def test_frozen_parts_cost_no_backward_pass():
    everything = ((r".*", 1.0),)
    encoder = flops(config(train_parts=everything)) - flops(config(train_parts=PHASE2))
    decoder = flops(config(train_parts=PHASE2)) - flops(config(train_parts=PHASE1))
    c = config().model
    rows, depth = config().batch_size * (1 + c.encoder.patches), 1  # of one scanned block, forward 2, backward 4 a weight and row
    block = 4 * c.encoder.embed**2 + 2 * c.encoder.embed * c.encoder.mlp
    assert encoder > 0.8 * 4 * rows * depth * block  # its backward pass is in the one and not in the other
    assert decoder > 0


def test_figures_of_evaluation_are_logged_during_the_run(tokenizer, tmp_path):
    c = config(steps=4)
    c.eval.every_steps = 2
    given = start(c)
    seen = []
    train(c, tmp_path, batches(tokenizer, c), given, on_eval=lambda arrays: seen.append(set(arrays)) or {"eval/accuracy": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2, 4]
    assert seen[0] == set(start(c)) and not given


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
    assert "train/loss" in rows[1] and "train/loss" not in rows[2]
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


def test_an_uneven_batch_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="4 rows at a time, which 8 devices"):
        fit(config(MeshConfig(8, 1), grad_accum=4), tokenizer, tmp_path)


def test_a_resumed_file_of_metrics_loses_what_is_done_again_and_what_was_cut(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "train/loss": 3}\n{"step": 2, "train/loss": 2}\n{"step": 3, "tra')
    resumed(file, 1).close()
    assert file.read_text() == '{"step": 1, "train/loss": 3}\n'


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
