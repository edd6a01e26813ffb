"""The loop: accumulation, meshes, freezing, broken losses, resuming."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal
from runs import LENGTH, PHASE1, PHASE2, Pictures, batches, config, rows, start

from omnifusion_jax import hosts, sharding
from omnifusion_jax.batch import Batch
from omnifusion_jax.config import CheckpointConfig, LoraConfig, MeshConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.bad_steps import NotFinite
from omnifusion_jax.training.checkpoint import Checkpoints, restore_params, steps
from omnifusion_jax.training.evaluating import Evaluations
from omnifusion_jax.training.freeze import split
from omnifusion_jax.training.loop import following, rows_as_promised, train
from omnifusion_jax.training.optimizer import make_optimizer
from omnifusion_jax.training.program import make_program
from omnifusion_jax.training.signals import Stop
from omnifusion_jax.training.start import fill
from omnifusion_jax.training.step import init_state, make_step


def losses(workdir):
    return [row.get("train/loss") for row in rows(workdir)]


def fit(c, tokenizer, workdir, given=None, wrap=lambda b: b, **settings):
    workdir.mkdir(exist_ok=True)
    trained, frozen = train(
        c, workdir, wrap(batches(tokenizer, c, **settings)), start(c) if given is None else given
    )
    return losses(workdir), jax.device_get(trained), jax.device_get(frozen)


@pytest.fixture(scope="module")
def reference(tokenizer, tmp_path_factory):
    return fit(config(), tokenizer, tmp_path_factory.mktemp("reference"))


def test_it_learns_and_leaves_frozen_parts_alone(reference):
    curve, trained, frozen = reference
    assert curve[-1] < 0.8 * curve[0]
    given = start(config())
    assert set(frozen) == {path for path in given if path.startswith("image/encoders/")}
    for path, a in frozen.items():
        assert_array_equal(a, given[path])
    assert not [path for path, a in trained.items() if np.abs(a - given[path]).max() == 0]


def test_what_is_fresh_follows_from_the_seed():
    """The adapter of a run that is given the rest: another one with another seed, the same with the same."""
    kernel = "image/adapter/linear/kernel"

    def drawn(seed):
        c = config(seed=seed)
        given = {path: a for path, a in start(c).items() if not path.startswith("image/adapter/")}
        return np.asarray(fill(c, sharding.make_mesh(fsdp=1), given)[1][kernel])

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3


def test_accumulation_is_exact(reference, tokenizer, tmp_path):
    curve, _, _ = fit(config(grad_accum=8), tokenizer, tmp_path)
    assert_allclose(curve, reference[0], rtol=1e-5)


def test_rows_that_share_pools_give_the_same_losses(reference, tokenizer, tmp_path):
    """Four rows a pool, a pool a device and portion."""
    curve, _, _ = fit(config(MeshConfig(1, 2), grad_accum=2), tokenizer, tmp_path, pools=4)
    assert_allclose(curve, reference[0], rtol=1e-5)


def test_the_mean_of_the_means_of_rows(reference, tokenizer, tmp_path):
    """Another loss than the mean over all targets, since answers differ in length."""
    curve, _, _ = fit(config(steps=1, loss_mean_rows=1), tokenizer, tmp_path)
    assert abs(curve[0] - reference[0][0]) > 1e-3


def test_frozen_parts_have_no_optimizer_state(tokenizer, tmp_path):
    """In the checkpoint that a run leaves: two moments for what is trained, nothing else."""
    _, trained, frozen = fit(config(steps=1, train_parts=PHASE1), tokenizer, tmp_path)
    kept = saved(tmp_path, 1).state
    sizes = lambda tree: sum(a.size for a in jax.tree.leaves(tree) if a.ndim)
    assert set(kept["params"]) == set(trained) and not set(trained) & set(frozen)
    assert sizes(kept["optimizer"]) == 2 * sizes(trained)


EVERYTHING = ((r".*", 1.0),)


@functools.cache
def flops(train_parts, pictures=1):
    """Of the step, as the compiler counts them: a scan's body once, the same for all. `pictures` a row."""
    c, objective = config(train_parts=train_parts), OBJECTIVES["answers"]
    skeleton = nnx.eval_shape(lambda: objective.module(c.model, rngs=nnx.Rngs(0)))
    trained, frozen = split(c.train_parts, nnx.parameters(skeleton))
    optimizer = make_optimizer(c.optimizer, c.steps, c.train_parts)
    state = jax.eval_shape(lambda p: init_state(optimizer, p), trained)
    plane = lambda dtype, *shape: jax.ShapeDtypeStruct((c.batch_size, *shape), dtype)
    integers = plane(np.int32, LENGTH)
    media = {"image": (plane(np.uint8, pictures, 24, 24, 3),)}
    batch = Batch(
        integers, integers, integers, plane(np.float32, LENGTH), integers, integers, plane(np.int32), media
    )
    step = make_step(
        skeleton, objective, optimizer, seed=0, grad_accum=1, dtype=np.dtype("float32"), remat="none"
    )
    return jax.jit(step).lower(state, frozen, batch).cost_analysis()["flops"]


def test_frozen_parts_cost_no_backward_pass():
    encoder = flops(EVERYTHING) - flops(PHASE2)
    decoder = flops(PHASE2) - flops(PHASE1)
    c = config().model.image.encoders[0]
    patches, depth = (
        config().batch_size * (1 + c.patches),
        1,
    )  # of one scanned block, forward 2, backward 4 a weight and row
    block = 4 * c.width**2 + 2 * c.width * c.mlp
    assert encoder > 0.8 * 4 * patches * depth * block  # its backward pass is in the one and not in the other
    assert decoder > 0


def test_a_batch_without_pictures_runs_no_encoder():
    """Not forward, and nothing of its gradient either."""
    c = config().model.image.encoders[0]
    block = 2 * config().batch_size * (1 + c.patches) * (4 * c.width**2 + 2 * c.width * c.mlp)
    with_some, without = (flops(EVERYTHING, pictures) for pictures in (1, 0))
    assert with_some - without > 0.8 * 3 * block


class Silent(Pictures):
    """The same dialogues, nothing shown."""

    def __getitem__(self, i):
        return dataclasses.replace(super().__getitem__(i), media=())


def test_a_run_without_pictures_trains(tokenizer, tmp_path):
    """What nothing was fed to has a gradient of 0, no NaN, and stays as it was; all else learns."""
    c = config()
    curve, trained, _ = fit(c, tokenizer, tmp_path, source=Silent())
    lines = rows(tmp_path)
    assert [row["train/bad_steps"] for row in lines] == [0] * 6 and {
        row["train/images_per_s"] for row in lines[1:]
    } == {0.0}
    assert curve[-1] < 0.8 * curve[0]
    given = start(c)
    still = {path for path, a in trained.items() if np.abs(a - given[path]).max() == 0}
    assert still == {path for path in trained if path.startswith("image/")} | {"special/soi", "special/eoi"}


class Several(Pictures):
    """Dialogues of none to three pictures, sixteen without any before sixteen with some."""

    def __getitem__(self, i):
        shown = tiny.shown(*np.random.default_rng(i).integers(0, 256, (i % 4, 24, 24, 3), np.uint8))
        return dataclasses.replace(super().__getitem__(i), media=shown if i % 32 >= 16 else ())


def test_pictures_are_counted_and_not_the_dialogues_that_have_them(tokenizer, tmp_path, capsys):
    """By turns a batch without pictures and one of 24: two programs, one run, and figures of both."""
    c = config(steps=4)
    settings = {"source": Several(), "length": 96, "shuffle": False, "pools": 2}
    curve, _, _ = fit(c, tokenizer, tmp_path, **settings)
    assert np.isfinite(curve).all()
    given = batches(tokenizer, c, **settings)
    expected = [(batch.items.sum(), (batch.kind > 0).sum()) for batch in (next(given) for _ in range(4))]
    assert [pictures for pictures, _ in expected] == [0, 24, 0, 24]
    for row, (pictures, tokens) in list(zip(rows(tmp_path), expected, strict=True))[1:]:
        assert row["train/images_per_s"] / row["train/tokens_per_s"] == pytest.approx(pictures / tokens)
    said = capsys.readouterr().out
    assert said.count(": compiling for batches with another number of pictures") == 1
    told = [line for line in said.splitlines() if line.startswith("attention: ")]
    assert told == [
        "attention: dense (96 x 96, head_dim 16, causal, window 64, float32); "
        "splash is for tpu; cudnn is for gpu; triton is for gpu",
        "attention: dense (10 x 10, head_dim 8, float32); dense (9 x 9, head_dim 16, float32)",
    ]


def test_figures_of_evaluation_are_logged_during_the_run(tokenizer, tmp_path):
    """Also those of an evaluation that the run was cut off in: it comes first when the run goes on."""
    c = config(steps=4)
    c.eval.every_steps = 2
    seen = []

    def evaluate(arrays):
        seen.append({path: np.array(a) for path, a in arrays.items()})
        if len(seen) == 2:
            raise Interrupted
        return {"accuracy": 0.25 * len(seen)}, []

    given = start(c)
    with pytest.raises(Interrupted):
        train(c, tmp_path, batches(tokenizer, c), given, Evaluations(evaluate, c))
    assert not given
    train(c, tmp_path, batches(tokenizer, c), start(c), Evaluations(evaluate, c))
    lines = rows(tmp_path)
    assert [(row["step"], row["eval/accuracy"]) for row in lines if "eval/accuracy" in row] == [
        (2, 0.25),
        (4, 0.75),
    ]
    early, cut, again = seen
    assert set(early) == set(start(c)) and not np.array_equal(
        early["image/adapter/linear/kernel"], cut["image/adapter/linear/kernel"]
    )
    for path, a in cut.items():
        assert_array_equal(a, again[path])


def test_the_best_state_is_kept_beside_the_newest_and_so_it_is_when_a_run_goes_on(tokenizer, tmp_path):
    c = config(checkpoint=CheckpointConfig(every_steps=0, keep=2))
    c.eval.every_steps, c.checkpoint.keep_best = 1, "accuracy"
    accuracies, seen = [0.1, 0.9, float("nan"), 0.4, 0.9, 0.2], []

    def evaluate(arrays):
        seen.append(jax.device_get(arrays))
        return {"accuracy": accuracies[len(seen) - 1]}, []

    def kept():
        return sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())

    with pytest.raises(Interrupted):
        train(c, tmp_path, Ends(batches(tokenizer, c), 4), start(c), Evaluations(evaluate, c))
    assert kept() == [2, 3, 4]
    evaluations = Evaluations(evaluate, c)
    trained, _ = train(c, tmp_path, batches(tokenizer, c), start(c), evaluations)
    assert kept() == [2, 5, 6] == sorted(steps(tmp_path / "checkpoints")) and len(seen) == 6
    assert evaluations.best([2, 5, 6]) == 2 and evaluations.best([3]) is None  # the first of equals
    best = restore_params(tmp_path / "checkpoints" / "2", trained)
    assert set(best) == set(trained)
    for path, a in best.items():
        assert a.sharding == trained[path].sharding
        assert_array_equal(a, seen[1][path])


def test_the_last_evaluation_is_logged_too_and_made_once(tokenizer, tmp_path):
    """Also when it was cut off, or when a finished run is started again for its report."""
    c, seen = config(steps=2), []

    def evaluate(arrays):
        seen.append(arrays)
        if len(seen) == 1:
            raise Interrupted
        return {"loss": 2.0}, []

    def run():
        train(c, tmp_path, batches(tokenizer, c), start(c), Evaluations(evaluate, c))
        return [row for row in rows(tmp_path) if "eval/loss" in row]

    with pytest.raises(Interrupted):
        run()
    assert run() == run() == [{"step": 2, "eval/loss": 2.0}] and len(seen) == 3


class Interrupted(Exception):
    pass


class Wrapped:
    """Batches, all but what a subclass does in another way."""

    def __init__(self, inner):
        self.inner, self.n = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)


class Ends(Wrapped):
    """Batches that end after `n`, and count those that were taken."""

    def __init__(self, inner, n):
        super().__init__(inner)
        self.n, self.given = n, 0

    def __next__(self):
        if self.given == self.n:
            raise Interrupted
        self.given += 1
        return next(self.inner)


def saved(workdir, step):
    """What a checkpoint holds, read without this library."""
    with ocp.CheckpointManager(workdir / "checkpoints", item_names=("state", "position")) as manager:
        return manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), position=ocp.args.JsonRestore())
        )


FACTORS = r"decoder/.*/lora_[ab]"
DROPPING = {
    "adapter": {"dropout": 0.2},
    "factors": {
        "lora": LoraConfig(rank=4, dropout=0.2),
        "train_parts": (
            (rf"image/adapter/.*|special/.*|{FACTORS}", 1.0),
            (rf"image/encoders/.*|(?!{FACTORS})decoder/.*", None),
        ),
    },
}


@pytest.mark.parametrize("place", DROPPING)
def test_resume_continues_the_same_curve(reference, tokenizer, tmp_path, capsys, place):
    """It does with dropout, whose keys follow from the step, and between two lines of the metrics.

    All of it comes from the checkpoint: the parameters that are given to be trained are worthless.
    """
    c = config(steps=7, log_every=4, checkpoint=CheckpointConfig(every_steps=3), **DROPPING[place])
    c.optimizer.schedule = "constant"
    whole, expected, _ = fit(c, tokenizer, tmp_path / "whole")
    assert len(whole) == 3
    if place == "adapter":  # factors are zero in the first step
        assert whole[0] != reference[0][0]  # dropout does something
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted):
        fit(c, tokenizer, cut, wrap=lambda inner: Ends(inner, 4))
    rows = saved(cut, 4).position["data"]["rows"]
    assert [looked for looked, *_ in rows.values()] == [4] * 16  # what was learned before the data failed
    assert "no next batch: the state after step 4 is saved" in capsys.readouterr().out
    shutil.rmtree(cut / "checkpoints" / "4")  # as a machine that dies leaves it
    worthless = {path: 0 * a if path in expected else a for path, a in start(c).items()}
    counted = []
    curve, trained, _ = fit(
        c, tokenizer, cut, worthless, wrap=lambda inner: counted.append(Ends(inner, 99)) or counted[0]
    )
    assert counted[0].given == 4  # of steps 4 to 7
    assert curve == whole
    for path, a in trained.items():
        assert_array_equal(a, expected[path])
    rows = saved(cut, 7).position["data"]["rows"]
    assert [looked for looked, *_ in rows.values()] == [7] * 16

    def grown(inner):
        inner.records += 1
        return inner

    with pytest.raises(ConfigError, match="had 64 records when the run was saved, now it has 65"):
        fit(c, tokenizer, cut, wrap=grown)


def test_resume_on_another_mesh(reference, tokenizer, tmp_path):
    """What is restored is the same to the bit, and what is learned from there to 1e-6."""
    c = config(MeshConfig(1, 8), checkpoint=CheckpointConfig(every_steps=3), steps=6)
    whole, expected, _ = fit(c, tokenizer, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    before = saved(tmp_path, 3).state
    c = config(MeshConfig(4, 2))
    program = make_program(c, sharding.make_mesh(**vars(c.mesh)))
    checkpoints = Checkpoints(tmp_path / "checkpoints", c.checkpoint, read_only=True)
    state, _ = checkpoints.restore(program.state, jax.tree.map(lambda a: a.sharding, program.state))
    checkpoints.close()
    jax.tree.map(assert_array_equal, before["params"], jax.device_get(state.params))
    assert {a.sharding.mesh.shape["data"] for a in state.params.values()} == {4}
    curve, trained, _ = fit(c, tokenizer, tmp_path)
    assert curve[:3] == whole[:3]
    assert_allclose(curve, whole, rtol=1e-6)
    assert_allclose(curve, reference[0], rtol=1e-5)
    for path, a in trained.items():
        assert_allclose(a, expected[path], atol=2e-5)  # Adam divides by roots of tiny moments


def poisoned(step):
    """Batches whose `step`-th has weights that make the loss NaN."""

    class Poisoned(Wrapped):
        def __next__(self):
            self.n += 1
            batch = next(self.inner)
            return batch._replace(weights=batch.weights * np.float32("nan")) if step(self.n) else batch

    return Poisoned


def test_a_broken_loss_leaves_no_trace(tokenizer, tmp_path):
    """If the second batch gives NaN, parameters and moments are to the bit those of a run without it."""

    class Without(Wrapped):
        """Batches but the second."""

        def __next__(self):
            self.n += 1
            if self.n == 2:
                next(self.inner)
            return next(self.inner)

    c = config(steps=4)
    c.optimizer.schedule = "constant"  # the cosine of three steps is not that of four
    fit(c, tokenizer, tmp_path / "broken", wrap=poisoned(lambda n: n == 2))
    c.steps = 3
    expected, _, _ = fit(c, tokenizer, tmp_path / "without", wrap=Without)
    lines = rows(tmp_path / "broken")
    assert [row["train/bad_steps"] for row in lines] == [0, 1, 1, 1]
    assert "train/loss" not in lines[1] and "train/grad_norm" not in lines[1]
    assert [row["train/loss"] for row in lines if "train/loss" in row] == expected
    broken, without = saved(tmp_path / "broken", 4).state, saved(tmp_path / "without", 3).state
    assert (
        broken.pop("step") == 4
        and without.pop("step") == 3
        and broken.pop("bad_steps") == 1
        and without.pop("bad_steps") == 0
    )
    assert sum(a.size for a in jax.tree.leaves(broken)) > 3 * 60_000  # parameters and both moments
    jax.tree.map(assert_array_equal, broken, without)


def test_too_many_broken_losses_stop_the_run(tokenizer, tmp_path):
    """And say what each of them had read."""
    c = config(max_bad_steps=3)
    with pytest.raises(NotFinite, match=r"learning_rate.*bad_steps\.jsonl.*--replay=4"):
        fit(c, tokenizer, tmp_path, wrap=poisoned(lambda n: n > 1))
    assert len(rows(tmp_path)) == 4
    given = batches(tokenizer, c)
    order = [given.order[n] for n in range(4 * c.batch_size)]
    expected = [[[f"record {i}"] for i in order[16 * n : 16 * n + 16]] for n in range(4)]
    written = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    trained = sorted(path for path in start(c) if not path.startswith("image/encoders/"))
    assert written == [{"step": n, "parameters": trained, "rows": expected[n - 1]} for n in (2, 3, 4)]


def test_broken_losses_are_counted_anew_when_a_run_goes_on(tokenizer, tmp_path):
    """The figure is that of all steps; what stops the run are those since it was started last."""
    settings = {"max_bad_steps": 3, "checkpoint": CheckpointConfig(every_steps=2)}
    with pytest.raises(Interrupted):
        fit(
            config(**settings),
            tokenizer,
            tmp_path,
            wrap=lambda inner: Ends(poisoned(lambda n: True)(inner), 2),
        )
    fit(config(**settings), tokenizer, tmp_path, wrap=poisoned(lambda n: n <= 2))
    lines = rows(tmp_path)
    assert [row["train/bad_steps"] for row in lines] == [1, 2, 3, 4, 4, 4]


def test_an_attention_kernel_for_other_devices_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="attention=splash is for tpu devices, and these are cpu"):
        fit(config(attention="splash"), tokenizer, tmp_path)
    with pytest.raises(
        ConfigError, match="no attention kernel 'flash'; choose from dense, cudnn, few, loops, paged, splash"
    ):
        config(attention="flash")


def test_rows_that_break_the_promise_to_the_attention_kernel_are_refused(tokenizer):
    """Without packing a row is one dialogue, then padding; a kernel without segments relies on it."""
    c = config()
    batch = next(batches(tokenizer, c))
    rows_as_promised(c, batch)
    two = batch._replace(segments=batch.segments + (batch.positions > 20) * (batch.segments > 0))
    before = batch._replace(segments=np.roll(batch.segments, 1, axis=1))
    for broken in (two, before):
        with pytest.raises(ConfigError, match=r"Set data\.packing=True"):
            rows_as_promised(c, broken)
    c.data.packing = True
    rows_as_promised(c, two)


def test_what_hosts_that_share_their_rows_count_is_counted_once(monkeypatch):
    """Two hosts with one part of the batch, and two with the other."""
    monkeypatch.setattr(hosts, "gather", lambda word: [word | {"counts": {"cut": n}} for n in (3, 3, 4, 4)])
    given = type("Batches", (), {"__next__": lambda self: "a batch", "counts": lambda self: {"cut": 3}})()
    batch, due, counts = following(given, Stop(4), lambda: None, due=True, owners=[0, 2])
    assert (batch, due, counts["cut"]) == ("a batch", True, 7)


def test_an_uneven_batch_is_refused(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="4 examples at a time, which 8 devices"):
        fit(config(MeshConfig(8, 1), grad_accum=4), tokenizer, tmp_path)


def test_adafactor_in_bfloat16_with_remat_follows_float32(tokenizer, tmp_path):
    """Close to it, and not it; weights stay in float32, what is frozen does not."""
    curves = []
    for dtype, remat in (("float32", "none"), ("bfloat16", "full")):
        c = config(compute_dtype=dtype, remat=remat, steps=4, train_parts=PHASE1)
        c.optimizer.name, c.optimizer.learning_rate, c.optimizer.schedule = "adafactor", 1e-2, "constant"
        curve, trained, frozen = fit(c, tokenizer, tmp_path / dtype)
        assert {a.dtype.name for a in trained.values()} == {"float32"} and {
            a.dtype.name for a in frozen.values()
        } == {dtype}
        curves.append(np.array(curve))
    assert_allclose(curves[1], curves[0], rtol=0.01)
    assert np.abs(curves[1] - curves[0]).max() > 1e-5
    assert curves[0][0] - curves[0][-1] > 10 * np.abs(curves[1] - curves[0]).max()
