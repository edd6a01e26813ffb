"""The loss: one sum over target tokens, one count."""

import functools

import jax
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose

from omnifusion_jax.batch import INSTEAD, TEXT, UNKNOWN, Batch
from omnifusion_jax.data.synthetic import CELL_WORDS
from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx
from omnifusion_jax.sharding import make_mesh
from omnifusion_jax.tables import OBJECTIVES
from omnifusion_jax.training.loss import answer_loss, in_pieces


def model(seed=0):
    c = tiny.config()
    return nnx.with_parameters(abstract(c), tiny.arrays(c, seed=seed))


@functools.partial(jax.jit, static_argnames=("chunk", "remat"))  # op by op it would take minutes
def loss(m, batch, chunk=512, remat="full"):
    return answer_loss(m.decoder, m.hidden(batch), batch, chunk, remat)


def batch_of(rows, length, rng, positions=None):
    """Text-only rows, each a list of segment lengths packed one after the other."""
    shape = (len(rows), length)
    segments, places = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for i, lengths in enumerate(rows):
        at = 0
        for number, n in enumerate(lengths, 1):
            segments[i, at : at + n], places[i, at : at + n] = number, np.arange(n)
            at += n
    used = segments > 0
    tokens = np.where(used, rng.integers(3, tiny.VOCAB, shape), 0).astype(np.int32)
    weights = (used & (places > 0) & (rng.random(shape) < 0.6)).astype(np.float32)
    return Batch(
        tokens,
        np.where(used, TEXT, 0).astype(np.int32),
        np.zeros(shape, np.int32),
        weights,
        segments,
        places,
        *without_media(len(rows)),
    )


def without_media(rows):
    """The rest of a Batch that shows nothing."""
    return np.zeros(rows, np.int32), {"image": (np.zeros((rows, 0, 24, 24, 3), np.uint8),)}


forward = jax.jit(lambda m, batch: m(batch))


def plain(m, batch):
    """The same in the open: all logits at once, NumPy."""
    logits = np.asarray(forward(m, batch), np.float64)[:, :-1]
    logits -= logits.max(-1, keepdims=True)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets, weights = batch.tokens[:, 1:], batch.weights[:, 1:]
    nll = -np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    return (nll * weights * (batch.kind[:, 1:] != UNKNOWN)).sum(), weights.sum()


@pytest.mark.parametrize("chunk", [4, 7, 31, 32, 512])
def test_chunks_change_nothing(chunk):
    m, batch = model(), batch_of([[20], [31], [32]], 32, np.random.default_rng(1))
    total, count = loss(m, batch, chunk)
    expected, targets = plain(m, batch)
    assert_allclose(total, expected, rtol=2e-5)
    assert count == targets > 0


@pytest.mark.parametrize("chunk, pieces", [(15, 3), (31, 2), (32, 1)])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_pieces_are_of_one_length_and_kept_where_nothing_is_made_again(chunk, pieces, remat):
    """32 positions in pieces of at most 15 are 3 x 11, not 3 x 15; a backward pass makes logits again."""
    m, batch = model(), batch_of([[20], [31]], 32, np.random.default_rng(3))
    hidden = jax.jit(lambda m: m.hidden(batch))(m)
    back = jax.jit(jax.grad(lambda x: answer_loss(m.decoder, x, batch, chunk, remat)[0]))
    text, logits = back.lower(hidden).as_text(), f"2x{-(-32 // pieces)}x{tiny.VOCAB}xf32"
    assert f"tensor<{logits}" in text
    assert (f"tensor<{pieces}x{logits}" in text) == (remat == "none")  # all pieces, for the backward pass
    whole = jax.grad(lambda x: answer_loss(m.decoder, x, batch)[0])
    assert_allclose(back(hidden), whole(hidden), atol=1e-6)


@pytest.mark.parametrize("rows, pieces", [(8, 1), (32, 4)])
def test_a_device_has_2048_tokens_of_a_piece(rows, pieces):
    """Of 512 positions or more: the gradient of the head is summed over devices once a piece."""
    hidden = np.zeros((rows, 2048, 1), np.float32)
    with jax.set_mesh(make_mesh(fsdp=8)):
        assert in_pieces(hidden, None)(hidden).shape == (pieces, rows, 2048 // pieces, 1)


def test_an_unknown_target_costs_nothing_but_counts():
    m, batch = model(), batch_of([[12]], 12, np.random.default_rng(2))
    batch.weights[:, 5] = 1
    before, count = loss(m, batch)
    last = np.arange(12) == 11
    zero = batch._replace(
        tokens=np.where(last, 0, batch.tokens), weights=np.where(last, 1, batch.weights).astype(np.float32)
    )
    other = zero._replace(kind=np.where(last, UNKNOWN, zero.kind).astype(np.int32))
    same = batch._replace(weights=other.weights * ~last)
    without, fewer = loss(m, same)
    total, more = loss(m, other)
    assert_allclose(total, without, rtol=1e-5)
    assert more == fewer + 1
    assert np.isfinite(before) and count > 0
    as_text, equal = loss(m, zero)  # token 0 as any other, where the layout does not say that it is unknown
    assert as_text > total + 0.1 and equal == more
    assert_allclose([as_text, total], [plain(m, zero)[0], plain(m, other)[0]], rtol=2e-5)


def test_a_token_may_be_learned_as_another():
    m, batch = model(), batch_of([[12]], 12, np.random.default_rng(2))
    last = np.arange(12) == 11  # no hidden state before it sees it
    weights = np.where(last, 1, batch.weights).astype(np.float32)
    there = batch._replace(tokens=np.where(last, 7, batch.tokens), weights=weights)
    counts = there._replace(
        tokens=np.where(last, 9, batch.tokens),
        kind=np.where(last, INSTEAD, batch.kind),
        index=np.where(last, 7, batch.index),
    )
    assert_allclose(loss(m, counts), loss(m, there), rtol=1e-6)
    plainly = counts._replace(kind=batch.kind, index=batch.index)
    assert abs(loss(m, plainly)[0] - loss(m, there)[0]) > 1e-3


def test_an_empty_patch_costs_nothing_but_counts():
    """Word 0 of the encoder's objective says that nothing is there; most patches are such."""
    objective, c, rng = OBJECTIVES["patches"], tiny.config(), np.random.default_rng(6)
    empty = nnx.eval_shape(lambda: objective.module(c, rngs=nnx.Rngs(0)))
    drawn = {
        path: rng.normal(size=a.shape).astype(a.dtype) * 0.15 for path, a in nnx.parameters(empty).items()
    }
    reader = nnx.with_parameters(empty, drawn)
    tokens = rng.integers(1, len(CELL_WORDS), (3, c.image.encoders[0].patches)).astype(np.int32)
    tokens[0], tokens[1, ::2] = 0, 0
    pictures = rng.integers(0, 256, (3, 1, 24, 24, 3), np.uint8)
    rows = Batch(*(np.zeros_like(tokens),) * 6, items=None, media={"image": (pictures,)})
    batch = rows._replace(tokens=tokens, weights=np.ones(tokens.shape, np.float32))
    total, count = jax.jit(lambda reader: objective.loss(reader, batch, None, "none"))(reader)
    logits = np.asarray(jax.jit(lambda reader: reader(pictures[:, 0]))(reader), np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logp, tokens[..., None], -1)[..., 0][tokens != 0].sum()
    assert_allclose(total, expected, rtol=1e-5)
    assert count == tokens.size


def test_packed_equals_unpacked_in_value_and_gradient():
    rng = np.random.default_rng(3)
    packed = batch_of([[9, 14, 5]], 32, rng)
    rows = [np.flatnonzero(packed.segments[0] == i) for i in (1, 2, 3)]

    def apart(a):
        out = np.zeros((3, 32), a.dtype)
        for i, row in enumerate(rows):
            out[i, : len(row)] = a[0, row]
        return out

    single = Batch(*(apart(a) for a in packed[:6]), *without_media(3))
    single = single._replace(segments=(single.segments > 0).astype(np.int32))
    m = model()
    gradient = jax.jit(jax.value_and_grad(lambda m, b: loss(m, b)[0]))
    (a, ga), (b, gb) = gradient(m, packed), gradient(m, single)
    assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(ga.decoder), jax.tree.leaves(gb.decoder), strict=True):
        assert_allclose(x, y, atol=2e-5 * max(1e-3, float(np.abs(y).max())))


def test_a_sample_without_targets_gives_zero_not_nan():
    m, batch = model(), batch_of([[8]], 8, np.random.default_rng(4))
    batch.weights[:] = 0
    total, count = loss(m, batch)
    assert total == 0 and count == 0


def test_layers_are_computed_again_where_that_is_asked_for():
    m, batch = model(), batch_of([[8]], 8, np.random.default_rng(5))
    traced = {
        how: str(jax.make_jaxpr(lambda m, how=how: m.hidden(batch, remat=how))(m))
        for how in ("none", "dots", "full")
    }
    assert "prevent_cse" not in traced["none"] and "policy=None" in traced["full"]
    assert "prevent_cse" in traced["dots"] and "policy=None" not in traced["dots"]
