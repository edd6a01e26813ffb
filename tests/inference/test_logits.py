"""Each processor against its namesake in transformers, on random scores and texts."""

import dataclasses
import types
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.inference import logits

ROWS, VOCAB, ROOM, EOS = 4, 8, 12, 2
BANNED = ((5,), (3, 4), (1, 1, 6), (0, 7), (6, 4))

quick = settings(max_examples=60)


@st.composite
def texts(draw):
    """Draws (scores float32[ROWS, VOCAB], tokens int32[ROWS, ROOM], length).

    What stands after `length` must not matter.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tokens = rng.integers(0, draw(st.integers(1, VOCAB)), (ROWS, ROOM)).astype(np.int32)
    return rng.normal(size=(ROWS, VOCAB)).astype(np.float32), tokens, draw(st.integers(0, ROOM - 1))


def theirs(processor, scores, tokens=None, length=0):
    ids = (
        torch.zeros((ROWS, 0), dtype=torch.long)
        if tokens is None
        else torch.tensor(tokens[:, :length], dtype=torch.long)
    )
    return processor(ids, torch.tensor(scores)).numpy()


ngram = [jax.jit(partial(logits.no_repeat_ngram, n=n)) for n in range(1, 5)]
banned = jax.jit(partial(logits.no_banned, banned=BANNED))


@quick
@given(texts(), st.integers(1, 4))
def test_no_repeat_ngram(text, n):
    np.testing.assert_array_equal(ngram[n - 1](*text), theirs(hf.NoRepeatNGramLogitsProcessor(n), *text))


@quick
@given(texts())
def test_banned_sequences(text):
    processor = hf.NoBadWordsLogitsProcessor([list(ids) for ids in BANNED], eos_token_id=EOS)
    np.testing.assert_array_equal(banned(*text), theirs(processor, *text))


@quick
@given(texts(), st.sampled_from([0.5, 1.2, 3.0]))
def test_repetition_penalty(text, penalty):
    scores, tokens, length = text
    mine = logits.penalise(scores, tokens, length, np.float32(penalty))
    np.testing.assert_array_equal(
        mine, theirs(hf.RepetitionPenaltyLogitsProcessor(penalty), scores, tokens, length)
    )


def test_the_likeliest_token_stays_however_narrow_the_nucleus():
    """1 - top_p rounds to 1 here, and so may the sum of all probabilities: still one token is left, as with
    Hugging Face.
    """
    scores = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    mine = np.asarray(logits.top_p(scores, np.float32(1 - 1e-9)))
    np.testing.assert_array_equal(mine, theirs(hf.TopPLogitsWarper(1e-9), scores))
    assert (np.isfinite(mine).sum(axis=1) == 1).all() and (mine.argmax(axis=1) == scores.argmax(axis=1)).all()


def test_an_ngram_longer_than_the_room_bans_nothing():
    scores = np.zeros((1, VOCAB), np.float32)
    assert logits.no_repeat_ngram(scores, np.zeros((1, 3), np.int32), 3, 5) is scores


@pytest.mark.parametrize("length", range(4))
def test_forced_end(length):
    scores = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    tokens = np.zeros((ROWS, 4), np.int32)
    np.testing.assert_array_equal(
        logits.force(scores, EOS, length == 3),
        theirs(hf.ForcedEOSTokenLogitsProcessor(4, EOS), scores, tokens, length),
    )


def test_invalid_values():
    scores = np.array([[np.nan, np.inf, -np.inf, 1, -2, 0, 3e38, -3e38]] * ROWS, np.float32)
    np.testing.assert_array_equal(logits.finite(scores), theirs(hf.InfNanRemoveLogitsProcessor(), scores))


@quick
@given(texts(), st.integers(1, VOCAB + 2))
def test_top_k(text, k):
    scores = text[0].round(1)  # ties
    np.testing.assert_array_equal(logits.top_k(scores, k), theirs(hf.TopKLogitsWarper(k), scores))


@quick
@given(texts(), st.floats(0.01, 0.99))
def test_top_p(text, p):
    mine = np.asarray(logits.top_p(text[0], np.float32(1 - p)))
    np.testing.assert_array_equal(mine, theirs(hf.TopPLogitsWarper(p), text[0]))


@quick
@given(texts(), st.sampled_from([0.3, 1.0, 1.7]), st.sampled_from([0, 3]), st.sampled_from([0.5, 0.9, 1.0]))
def test_the_whole_chain(text, temperature, k, p):
    scores, tokens, length = text
    g = GenerationConfig(
        max_new_tokens=8,
        temperature=temperature,
        top_k=k,
        top_p=p,
        no_repeat_ngram_size=2,
        banned_tokens=BANNED,
        forced_eos=True,
    )
    g = dataclasses.replace(g, repetition_penalty=1.5)
    length = length % 8
    names = types.SimpleNamespace(eos=EOS, pad=0)
    mine = logits.process(scores, tokens, length, logits.knobs(g, ROOM), logits.rules(g, names, VOCAB, ROOM))
    chain = [
        hf.RepetitionPenaltyLogitsProcessor(1.5),
        hf.NoRepeatNGramLogitsProcessor(2),
        hf.NoBadWordsLogitsProcessor([list(ids) for ids in BANNED], eos_token_id=EOS),
        hf.ForcedEOSTokenLogitsProcessor(8, EOS),
        hf.InfNanRemoveLogitsProcessor(),
        hf.TemperatureLogitsWarper(temperature),
        *([hf.TopKLogitsWarper(k)] if k else []),
        *([hf.TopPLogitsWarper(p)] if p < 1 else []),
    ]
    other = scores
    for processor in chain:
        other = theirs(processor, other, tokens, length)
    probabilities = torch.softmax(torch.tensor(other), -1).numpy()
    np.testing.assert_allclose(jax.nn.softmax(mine), probabilities, atol=1e-6)


WORDS = {"\n": [4, 5], ":": [6], "</s>": [EOS], "": [], "x": [9]}
TOKENIZER = types.SimpleNamespace(eos=EOS, pad=0, encode=WORDS.__getitem__)


def test_the_official_recipe_bans_what_the_tokenizer_says():
    found = logits.rules(GenerationConfig.official(), TOKENIZER, VOCAB, 64)
    assert found.banned == ((4, 5), (6,), (5,))
    assert found.forced_eos and found.num_beams == 3 and found.no_repeat_ngram_size == 4


@pytest.mark.parametrize(
    ("g", "says"),
    [
        ({"banned": ("",)}, "no token"),
        ({"banned": ("x",)}, "0 to 7"),
        ({"banned_tokens": ((3, 8),)}, "0 to 7"),
    ],
)
def test_a_ban_that_cannot_be(g, says):
    with pytest.raises(ConfigError, match=says):
        logits.rules(GenerationConfig(**g), TOKENIZER, VOCAB, 64)


def test_bans_are_hashable_and_counted_once():
    found = logits.rules(GenerationConfig(banned_tokens=([5], (5,), [3, 4])), TOKENIZER, VOCAB, 64)
    assert found.banned == ((5,), (3, 4)) and hash(found) is not None


REAL = Path(__file__).parents[3] / "shared/data/omnifusion_1_1"


@pytest.mark.skipif(not REAL.is_dir(), reason="the published tokenizer lies beside the repository only")
def test_the_official_recipe_with_the_published_tokenizer():
    found = logits.rules(GenerationConfig.official(), Tokenizer(REAL), 32000, 64)
    assert set(found.banned) == {(28705, 13), (714,), (13,)} and (found.eos, found.pad) == (2, 0)
