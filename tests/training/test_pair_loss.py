"""The loss of pairs against plain PyTorch, which has the answers apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from omnifusion_jax.batch import Batch
from omnifusion_jax.config import PreferenceConfig
from omnifusion_jax.data.pairs import CHANGED
from omnifusion_jax.data.reference import REFERENCE
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.training.loss import log_likelihoods
from omnifusion_jax.training.pair_loss import pair_loss

ROWS, LENGTH = 3, 24
FIGURES = ("chosen_reward", "rejected_reward", "reward_margin", "preference_accuracy")
FIGURES += ("kl", "chosen_tokens", "rejected_tokens")
FORMS = {  # as published: plain, and both of dense DPO
    "dpo": PreferenceConfig(beta=0.1),
    "paper": PreferenceConfig(beta=0.5, changed_weight=5.0, average=True),
    "released": PreferenceConfig(beta=0.1, changed_weight=1.1),
    "all": PreferenceConfig(beta=0.3, changed_weight=3.0, average=True, smoothing=0.1, sft=0.2),
    "summed": PreferenceConfig(beta=0.3, changed_weight=0.5, smoothing=0.2, sft=0.1),
}


def drawn(seed):
    """A Batch of rows with none, one or two pairs and padding, and log p of its tokens."""
    rng = np.random.default_rng(seed)
    segments, weights = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.float32)
    for row, pairs in enumerate(rng.permutation([0, 1, 2])):
        start = 0
        for segment in range(1, 2 * pairs + 1):
            n = int(rng.integers(2, 6))
            segments[row, start : start + n] = segment
            weights[row, start + int(rng.integers(1, n)) : start + n] = 1
            start += n
    plane = np.zeros_like(segments)
    extra = {CHANGED: rng.integers(0, 2, plane.shape), REFERENCE: -rng.exponential(2.0, plane.shape)}
    extra = {name: a.astype(np.float32) for name, a in extra.items()}
    batch = Batch(plane, plane + 1, plane, weights, segments, plane, plane[:, 0], {}, extra)
    return batch, -rng.exponential(2.0, plane.shape).astype(np.float32)


def by_torch(scores, batch, c):
    """(loss of each pair, figures of each) one answer after the other, as the paper writes it."""
    losses, figures = [], []
    for row in range(ROWS):
        for first in range(1, batch.segments[row].max(), 2):
            found = []
            for segment in (first, first + 1):
                here = torch.tensor((batch.segments[row] == segment) & (batch.weights[row] > 0))
                w = torch.where(
                    torch.tensor(batch.extra[CHANGED][row])[here] > 0, c.changed_weight, 1.0
                ).double()
                ours, theirs = scores[row][here], torch.tensor(batch.extra[REFERENCE][row])[here].double()
                n = w.sum() if c.average else 1.0
                ratio = torch.exp(ours - theirs)
                found.append(((w * ours).sum() / n, (w * theirs).sum() / n, ratio - 1 - torch.log(ratio)))
            (w_ours, w_theirs, w_kl), (l_ours, l_theirs, l_kl) = found
            rewards = c.beta * (w_ours - w_theirs), c.beta * (l_ours - l_theirs)
            margin = rewards[0] - rewards[1]
            right, wrong = torch.sigmoid(margin), torch.sigmoid(-margin)
            loss = -(1 - c.smoothing) * torch.log(right) - c.smoothing * torch.log(wrong) - c.sft * w_ours
            losses.append(loss)
            kl = torch.cat([w_kl, l_kl]).mean()
            counts = torch.tensor([len(w_kl), len(l_kl)])
            figures.append([x.item() for x in (*rewards, margin, margin > 0, kl, *counts)])
    return torch.stack(losses), np.array(figures)


@pytest.fixture(scope="module")
def ours():
    """{form: jitted (scores, batch) -> ((loss, (count, figures)), gradient)}"""

    def of(c):
        def loss(scores, batch):
            value, *rest = pair_loss(scores, batch, c)
            return value, rest

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    return {name: of(c) for name, c in FORMS.items()}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_loss_gradient_and_figures_are_those_of_pytorch(form, seed, ours):
    batch, scores = drawn(seed)
    theirs = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    losses, figures = by_torch(theirs, batch, FORMS[form])
    losses.sum().backward()
    (value, (count, told)), gradient = ours[form](scores, batch)
    assert count == len(losses) == 3
    assert_allclose(value, losses.sum().item(), rtol=1e-6)
    assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-6, atol=1e-6)
    assert told.keys() == set(FIGURES)
    assert_allclose([told[name] for name in FIGURES], figures.sum(axis=0), rtol=1e-5, atol=1e-5)


def test_rows_without_pairs_count_for_nothing(ours):
    batch, scores = drawn(0)
    batch = batch._replace(segments=0 * batch.segments, weights=0 * batch.weights)
    (value, (count, _)), gradient = ours["paper"](scores, batch)
    assert value == count == 0 and not np.asarray(gradient).any()


def test_a_model_that_is_its_reference_prefers_nothing(ours):
    batch, scores = drawn(0)
    batch.extra[REFERENCE][:] = scores
    (value, (count, told)), _ = ours["dpo"](scores, batch)
    assert_allclose(value, count * np.log(2), rtol=1e-6)
    assert told["preference_accuracy"] == told["reward_margin"] == told["kl"] == 0


class Head:
    """A decoder that is its head alone."""

    def __init__(self, kernel):
        self.kernel = kernel

    def logits(self, x):
        return x @ self.kernel


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("chunk", [None, 7])
def test_log_likelihoods_are_those_of_the_next_tokens(chunk, remat):
    rng = np.random.default_rng(1)
    hidden, kernel = (
        rng.normal(size=(2, 24, 5)).astype(np.float32),
        rng.normal(size=(5, 11)).astype(np.float32),
    )
    tokens = rng.integers(0, 11, (2, 24)).astype(np.int32)
    batch = Batch(tokens, *[tokens] * 5, tokens[:, 0], {})
    pulled = jnp.asarray(rng.normal(size=tokens.shape).astype(np.float32))

    def ours(kernel):
        found = log_likelihoods(Head(kernel), hidden, batch, chunk, remat)
        return (found * pulled).sum(), found

    gradient, found = jax.jit(jax.grad(ours, has_aux=True))(kernel)
    theirs = torch.tensor(kernel, requires_grad=True)
    scores = torch.log_softmax(torch.tensor(hidden) @ theirs, -1)[:, :-1]
    expected = torch.gather(scores, -1, torch.tensor(tokens[:, 1:], dtype=torch.int64)[..., None])[..., 0]
    (expected * torch.tensor(np.asarray(pulled[:, 1:]))).sum().backward()
    assert_allclose(found[:, 1:], expected.detach(), rtol=1e-5, atol=1e-6)
    assert not np.asarray(found[:, 0]).any()
    assert_allclose(gradient, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "preference.beta 0.0 is not positive"),
        ({"changed_weight": 0.0}, "changed_weight 0.0 is not positive"),
        ({"smoothing": 0.5}, "a share of the pairs below 0.5"),
        ({"sft": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PreferenceConfig(**settings).validate()
