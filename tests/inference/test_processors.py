"""Each processor against its namesake in transformers, on random scores and texts."""

import types

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.inference import processors
from omnifusion_jax.inference.options import Sizes, blank, options, packed, write
from omnifusion_jax.inference.processors import So

ROWS, VOCAB, ROOM, EOS = 4, 8, 12, 2
BANNED = ((5,), (3, 4), (1, 1, 6), (0, 7), (6, 4))
NAMES = types.SimpleNamespace(eos=EOS, pad=0)
SIZES = Sizes(VOCAB, ROOM)

quick = settings(max_examples=60, deadline=None)


@st.composite
def texts(draw):
    """Draws (scores float32[ROWS, VOCAB], tokens int32[ROWS, ROOM], length).

    What stands after `length` must not matter.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = rng.integers(0, draw(st.integers(1, VOCAB)), (ROWS, ROOM)).astype(np.int32)
    return rng.normal(size=(ROWS, VOCAB)).astype(np.float32), tokens, draw(st.integers(0, ROOM - 1))


def asked(*generations, **each):
    """Options of ROWS rows that ask for this: all for the same, or each for its own."""
    table = blank(ROWS, SIZES)
    for row in range(ROWS):
        g = generations[row] if generations else GenerationConfig(**{"max_new_tokens": ROOM, **each})
        write(table, [row], options(g, NAMES, SIZES))
    return table


def so(tokens=None, length=0):
    tokens = np.zeros((ROWS, ROOM), np.int32) if tokens is None else tokens
    return So(tokens, np.full(ROWS, length, np.int32))


ours = {name: jax.jit(change) for name, change in vars(processors).items() if callable(change)}
process = jax.jit(processors.process)


def theirs(processor, scores, tokens=None, length=0):
    ids = (
        torch.zeros((ROWS, 0), dtype=torch.long)
        if tokens is None
        else torch.tensor(tokens[:, :length], dtype=torch.long)
    )
    return processor(ids, torch.tensor(scores)).numpy()


@quick
@given(texts(), st.integers(1, 15))
def test_no_repeat_ngram(text, n):
    """Also of one that is longer than the room, which forbids nothing."""
    scores, *text = text
    mine = ours["no_repeat_ngram"](scores, so(*text), asked(no_repeat_ngram_size=n))
    np.testing.assert_array_equal(mine, theirs(hf.NoRepeatNGramLogitsProcessor(n), scores, *text))


@quick
@given(texts())
def test_banned_sequences(text):
    scores, *text = text
    processor = hf.NoBadWordsLogitsProcessor([list(ids) for ids in BANNED], eos_token_id=EOS)
    mine = ours["no_banned"](scores, so(*text), asked(banned_tokens=BANNED))
    np.testing.assert_array_equal(mine, theirs(processor, scores, *text))


@quick
@given(texts(), st.sampled_from([0.5, 1.2, 3.0]))
def test_repetition_penalty(text, penalty):
    scores, *text = text
    mine = ours["penalise"](scores, so(*text), asked(repetition_penalty=penalty))
    # the compiler divides by multiplying with the inverse
    other = theirs(hf.RepetitionPenaltyLogitsProcessor(penalty), scores, *text)
    np.testing.assert_allclose(mine, other, rtol=3e-7)


def test_the_likeliest_token_stays_however_narrow_the_nucleus():
    """1 - top_p rounds to 1 here, and so may the sum of all probabilities: still one token is left, as with
    Hugging Face.
    """
    scores = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    mine = np.asarray(ours["top_p"](scores, so(), asked(top_p=1e-9)))
    np.testing.assert_array_equal(mine, theirs(hf.TopPLogitsWarper(1e-9), scores))
    assert (np.isfinite(mine).sum(axis=1) == 1).all() and (mine.argmax(axis=1) == scores.argmax(axis=1)).all()


def test_invalid_values():
    scores = np.array([[np.nan, np.inf, -np.inf, 1, -2, 0, 3e38, -3e38]] * ROWS, np.float32)
    mine = ours["finite"](scores, so(), asked())
    np.testing.assert_array_equal(mine, theirs(hf.InfNanRemoveLogitsProcessor(), scores))


@quick
@given(texts(), st.integers(1, VOCAB + 2))
def test_top_k(text, k):
    scores = text[0].round(1)  # ties, and zeros of both signs
    mine = ours["top_k"](scores, so(), asked(top_k=k))
    np.testing.assert_array_equal(mine, theirs(hf.TopKLogitsWarper(k), scores))


@quick
@given(texts(), st.floats(0.01, 0.99))
def test_top_p(text, p):
    mine = ours["top_p"](text[0], so(), asked(top_p=p))
    np.testing.assert_array_equal(mine, theirs(hf.TopPLogitsWarper(p), text[0]))


def test_tokens_that_tie_at_the_edge_of_the_nucleus_stay():
    """Their namesake keeps two of the three, whichever its sorting puts last."""
    scores = np.log(np.array([[0.4, 0.15, 0.15, 0.15, 0.05, 0.04, 0.03, 0.03]] * ROWS, np.float32))
    mine = np.asarray(ours["top_p"](scores, so(), asked(top_p=0.6)))
    assert (np.isfinite(mine) == (np.arange(VOCAB) < 4)).all()
    assert np.isfinite(theirs(hf.TopPLogitsWarper(0.6), scores)).sum(1).tolist() == [3] * ROWS


@quick
@given(texts(), st.floats(0.01, 1.0))
def test_min_p(text, p):
    mine = ours["min_p"](text[0], so(), asked(min_p=p))
    np.testing.assert_array_equal(mine, theirs(hf.MinPLogitsWarper(p), text[0]))


@quick
@given(texts(), st.sampled_from([("top_k", 1), ("top_p", 0.1), ("min_p", 0.9)]))
def test_what_a_search_keeps_at_least(text, setting):
    """One token more than can end a text, as transformers has it for beams."""
    (name, value), scores = setting, text[0]
    kind = {"top_k": hf.TopKLogitsWarper, "top_p": hf.TopPLogitsWarper, "min_p": hf.MinPLogitsWarper}[name]
    table = asked(**{name: value}, stop_token_ids=(5,))._replace(beams=np.full(ROWS, 2, np.int32))
    mine = np.asarray(ours[name](scores, so(), table))
    np.testing.assert_array_equal(mine, theirs(kind(value, min_tokens_to_keep=3), scores))
    assert (np.isfinite(mine).sum(1) >= 3).all()


RECIPE = {
    "max_new_tokens": 8,
    "min_new_tokens": 5,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 2,
    "banned_tokens": BANNED,
    "suppress_tokens": (1,),
    "begin_suppress_tokens": (3, 7),
    "stop_token_ids": (6,),
}


def chain(temperature, k, p, least):
    """The same recipe in transformers."""
    ends = [EOS, 6]
    return [
        hf.RepetitionPenaltyLogitsProcessor(1.5),
        hf.NoRepeatNGramLogitsProcessor(2),
        hf.NoBadWordsLogitsProcessor([list(ids) for ids in BANNED], eos_token_id=ends),
        hf.MinNewTokensLengthLogitsProcessor(0, 5, ends),
        hf.ForcedEOSTokenLogitsProcessor(8, EOS),
        hf.InfNanRemoveLogitsProcessor(),
        hf.SuppressTokensLogitsProcessor([1]),
        hf.SuppressTokensAtBeginLogitsProcessor([3, 7], 0),
        hf.TemperatureLogitsWarper(temperature),
        *([hf.TopKLogitsWarper(k)] if k else []),
        *([hf.TopPLogitsWarper(p)] if p < 1 else []),
        *([hf.MinPLogitsWarper(least)] if least else []),
    ]


@quick
@given(
    texts(),
    st.sampled_from([0.3, 1.0, 1.7]),
    st.sampled_from([0, 3]),
    st.sampled_from([0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.2]),
)
def test_the_whole_chain(text, temperature, k, p, least):
    """A row that asks for nothing stands beside the others, and keeps its scores."""
    scores, tokens, length = text
    drawn = {"temperature": temperature, "top_k": k, "top_p": p, "min_p": least}
    g = GenerationConfig(**RECIPE, **drawn, forced_eos=True)
    length = length % 8
    table = asked(*[g] * (ROWS - 1), GenerationConfig(max_new_tokens=ROOM))
    mine = process(scores, so(tokens, length), table, np.ones(ROWS, bool))
    other = scores
    for processor in chain(temperature, k, p, least):
        other = theirs(processor, other, tokens, length)
    probabilities = torch.softmax(torch.tensor(other), -1).numpy()
    np.testing.assert_allclose(jax.nn.softmax(mine)[:-1], probabilities[:-1], atol=1e-6)
    np.testing.assert_array_equal(mine[-1], scores[-1])


def test_the_first_token_is_forced_and_the_next_may_not_be_suppressed():
    scores = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    table = asked(forced_bos_token_id=3, begin_suppress_tokens=(4, 1))
    for length, expected in enumerate(({3}, set(range(VOCAB)) - {1, 4}, set(range(VOCAB)))):
        mine = np.asarray(process(scores, so(length=length), table, np.ones(ROWS, bool)))
        likely = jax.nn.softmax(mine) > 0
        assert {i for i in range(VOCAB) if likely[0, i]} == expected


def test_packed_masks():
    """Over more than a word, with every place of a word."""
    rng = np.random.default_rng(0)
    for vocab in (8, 31, 32, 33, 100):
        tokens = np.flatnonzero(rng.random(vocab) < 0.4)
        mask = np.asarray(processors.unpacked(packed(tokens, vocab)[None], vocab))
        assert mask.shape == (1, vocab) and np.flatnonzero(mask[0]).tolist() == tokens.tolist()


def test_only_allowed_tokens_stay():
    table = asked()._replace(allowed=np.stack([packed(row, VOCAB) for row in ((1,), (0, 7), (2, 3), (5,))]))
    mine = np.asarray(process(np.zeros((ROWS, VOCAB), np.float32), so(), table, np.ones(ROWS, bool)))
    found = [np.flatnonzero(row).tolist() for row in np.asarray(jax.nn.softmax(mine) > 0)]
    assert found == [[1], [0, 7], [2, 3], [5]]


@pytest.mark.parametrize("going", [True, False])
def test_rows_that_are_done_change_nothing(going):
    scores = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    table = asked(temperature=0.5, top_k=2, banned_tokens=BANNED)
    mine = process(scores, so(), table, np.array([going, False, False, False]))
    np.testing.assert_array_equal(mine[1:], scores[1:])
    assert (np.asarray(mine[0]) == scores[0]).all() != going
