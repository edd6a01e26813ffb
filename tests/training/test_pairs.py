"""An objective of one's own on pairs of answers: what it takes, and that no pair is ever parted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from omnifusion_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.models.omnifusion import OmniFusion, abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.objectives.answers import Answers, common
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.loop import train

LENGTH = 80


@dataclasses.dataclass
class Pair:
    """A question with an answer that is preferred to another."""

    where: str
    picture: np.ndarray
    chosen: str
    rejected: str


@dataclasses.dataclass
class PreparePair:
    """The Samples of both answers, the chosen one first."""

    prepare: Prepare

    def __call__(self, pair):
        turns = lambda answer: (("user", "What is it?"), ("assistant", answer))
        talks = (turns(pair.chosen), turns(pair.rejected))
        return [self.prepare(Dialogue(pair.where, talk, tiny.shown(pair.picture))) for talk in talks]


class Pairs:
    """16 pairs; the pictures differ, and so do the lengths of the answers."""

    def __len__(self):
        return 16

    def __getitem__(self, i):
        picture = np.random.default_rng(int(i)).integers(0, 256, (24, 24, 3), np.uint8)
        return Pair(f"pairs[{i}]", picture, "A red circle." + " It is." * (i % 3), "Two squares.")


def preferences(logits, batch):
    """By how much the chosen answer of each pair is likelier: float32[pairs]."""
    scores = jax.nn.log_softmax(logits[:, :-1])
    chosen = jnp.take_along_axis(scores, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    return (chosen * batch.weights[:, 1:]).sum(axis=1).reshape(-1, 2) @ jnp.array([1.0, -1.0])


class Preference(Answers):
    """-ln sigmoid of that: the loss of DPO without its reference."""

    rows, text, module = 2, True, OmniFusion

    def loss(self, module, batch, key, remat):
        logits = module.decoder.logits(module.hidden(batch, key, remat))
        found = preferences(logits, batch)
        return -jax.nn.log_sigmoid(0.1 * found).sum(), jnp.float32(len(found))

    def batches(self, config, tokenizer):
        prepare = Prepare.of(tokenizer, config.model, LENGTH)
        settings = {"length": LENGTH, "tiles": prepare.tiles, **common(config)}
        return Batches(Pairs(), PreparePair(prepare), **settings)


def config(grad_accum=1, mesh=(1, 1)):
    model = tiny.config()
    model.decoder.layers, model.image.encoders[0].layers = 1, 2
    return TrainConfig(
        model=model,
        objective="preference",
        steps=4,
        batch_size=8,
        grad_accum=grad_accum,
        compute_dtype="float32",
        log_every=1,
        train_parts=((r".*", 1.0),),
        mesh=MeshConfig(*mesh),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup=0.0),
        data=DataConfig(path="pairs", max_length=LENGTH),
    ).validate()


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "preference", Preference())


def fit(c, tokenizer, workdir):
    workdir.mkdir()
    train(c, workdir, OBJECTIVES["preference"].batches(c, tokenizer), tiny.arrays(c.model))
    return tiny.losses(workdir)


def test_a_batch_holds_both_rows_of_each_example(tokenizer):
    batch = next(OBJECTIVES["preference"].batches(config(2), tokenizer))
    assert batch.tokens.shape == (16, LENGTH) and batch.media["image"][0].shape[:2] == (2, 8)
    counts = batch.weights.sum(axis=1).reshape(8, 2)
    rejected = len(tokenizer.encode("Two squares.")) + 1
    assert (counts[:, 1] == rejected).all() and len(set(counts[:, 0])) == 3
    for pool in batch.media["image"][0]:
        pairs = pool.reshape(4, 2, -1)
        assert (pairs[:, 0] == pairs[:, 1]).all() and len(np.unique(pairs[:, 0], axis=0)) == 4


def test_a_record_with_another_number_of_rows_is_refused(tokenizer):
    """Were it not, every pair after it would be of two records."""
    found = OBJECTIVES["preference"].batches(config(), tokenizer)
    prepare = found.reader.prepare
    found.reader.prepare = lambda pair: prepare(pair)[: 1 if pair.where == "pairs[3]" else 2]
    with pytest.raises(AssertionError, match="records give different numbers of rows"):
        for _ in range(2):
            next(found)


def test_it_learns_what_is_preferred_and_no_portion_or_device_parts_a_pair(tokenizer, tmp_path):
    c = config()
    curve = fit(c, tokenizer, tmp_path / "one")
    batch = next(OBJECTIVES["preference"].batches(c, tokenizer))
    model = nnx.with_parameters(abstract(c.model), tiny.arrays(c.model))
    logits = jax.jit(lambda model, batch: model(batch))(model, batch)
    assert_allclose(curve[0], -np.mean(jax.nn.log_sigmoid(0.1 * preferences(logits, batch))), rtol=1e-5)
    assert curve[-1] < 0.9 * curve[0]
    assert_allclose(fit(config(2, (2, 2)), tokenizer, tmp_path / "four"), curve, rtol=1e-4)
