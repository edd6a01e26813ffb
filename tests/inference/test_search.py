"""Rows that ask for different things, side by side in one program, over Markov chains."""

import dataclasses

import drive
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.inference.options import Sizes, blank, options, write
from omnifusion_jax.inference.search import BLOCKS, Group, Logprobs, Scores, Search, best

VOCAB, ROOM, ROWS = drive.CONFIG.vocab, 8, 12
SIZES = Sizes(VOCAB, ROOM, beams=3)
FEW = GenerationConfig(max_new_tokens=ROOM)
ASKED = (  # of one request each
    {"num_beams": 3, "no_repeat_ngram_size": 2},
    {},
    {"temperature": 0.9, "top_k": 5, "seed": 3},
    {"num_beams": 2, "early_stopping": True, "length_penalty": 0.5, "banned_tokens": ((4, 5), (6,))},
    {"repetition_penalty": 1.7, "max_new_tokens": 5, "forced_eos": True},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02, "suppress_tokens": (1, 3), "min_new_tokens": 4},
    {"num_beams": 2, "temperature": 0.7, "max_new_tokens": 6},
)
REQUESTS = [dataclasses.replace(FEW, **settings) for settings in ASKED]

choose = jax.jit(Search.choose, static_argnames="sizes")
restart = jax.jit(Search.restart)


@pytest.fixture(scope="module")
def table():
    """float32[VOCAB, VOCAB], the scores of the next token by the last one; all begin after token 0."""
    scores = np.random.default_rng(2).normal(size=(VOCAB, VOCAB))
    scores[:, drive.EOS] += 0.7
    return scores.astype(np.float32)


def put(asked, places):
    """Options of ROWS rows with requests {number: GenerationConfig} at their places."""
    found = blank(ROWS, SIZES)
    for i, g in asked.items():
        write(found, np.s_[places[i] : places[i] + g.num_beams], options(g, drive.NAMES, SIZES, i))
    return found


def fresh(asked, places):
    return np.isin(
        np.arange(ROWS), [places[i] + rank for i, g in asked.items() for rank in range(g.num_beams)]
    )


def walk(search, o, table, steps, active=None):
    for _ in range(steps):
        search = choose(search, table[search.last()], o, sizes=SIZES, active=active)
    return search


def told(search, o, place):
    answers = jax.device_get(search.answers(o))
    n = answers.length[place]
    return (
        answers.tokens[place, :n].tolist(),
        answers.logprobs[place, :n].tolist(),
        float(answers.score[place]),
    )


def alone(table, i):
    """What a request gets that has the rows for itself."""
    asked, places = {i: REQUESTS[i]}, {i: 4}
    o = put(asked, places)
    search = walk(restart(Search.start(ROWS, SIZES), fresh(asked, places), o), o, table, ROOM)
    return told(search, o, 4)


PLACES = dict(enumerate((1, 0, 4, 5, 7, 8, 9)))


def test_a_request_does_not_see_its_neighbours(table):
    """Those of all kinds begin together; the last row is nobody's."""
    asked = dict(enumerate(REQUESTS))
    o = put(asked, PLACES)
    search = walk(restart(Search.start(ROWS, SIZES), fresh(asked, PLACES), o), o, table, ROOM)
    assert bool(search.done.all()) and not search.broken.any() and search.length[-1] == 0
    found = [told(search, o, PLACES[i]) for i in asked]
    assert found == [alone(table, i) for i in asked]
    assert len({tuple(tokens) for tokens, *_ in found}) > 4


def test_requests_begin_while_others_are_under_way(table):
    """Each in rows that another one had before."""
    first, then = {0: REQUESTS[0], 4: REQUESTS[4]}, {3: REQUESTS[3], 5: REQUESTS[5], 6: REQUESTS[6]}
    o = put(first, PLACES)
    search = walk(restart(Search.start(ROWS, SIZES), fresh(first, PLACES), o), o, table, 3)
    later = PLACES | {3: 4, 5: 6, 6: 8}
    o = put(first | then, later)
    search = walk(restart(search, fresh(then, later), o), o, table, ROOM)
    assert [told(search, o, later[i]) for i in (0, 4, 3, 5, 6)] == [alone(table, i) for i in (0, 4, 3, 5, 6)]
    again = {1: REQUESTS[1]}
    o = put(again, {1: 1})
    search = walk(restart(search, fresh(again, {1: 1}), o), o, table, ROOM)
    assert told(search, o, 1) == alone(table, 1)


def test_a_row_that_waits_is_left_alone(table):
    """Whatever the scores in it are: with these it would break, or be stuck."""
    asked = {0: REQUESTS[0], 2: REQUESTS[2]}
    o = put(asked, PLACES)
    search = restart(Search.start(ROWS, SIZES), fresh(asked, PLACES), o)
    for step in range(2 * ROOM):
        waits = fresh({(0, 2)[step % 2]: asked[(0, 2)[step % 2]]}, PLACES)
        scores = jnp.where(waits[:, None], -jnp.inf, table[search.last()])
        search = choose(search, scores, o, sizes=SIZES, active=~waits)
        assert not search.broken.any() and not search.stuck.any()
        assert (np.asarray(search.parents)[waits] == np.arange(ROWS)[waits]).all()
    assert [told(search, o, PLACES[i]) for i in asked] == [alone(table, i) for i in asked]


def test_parents_are_rows_of_the_same_request(table):
    """And every running text is that of its parent, with one token more."""
    asked = {0: REQUESTS[0], 3: REQUESTS[3]}
    o = put(asked, PLACES)
    search, moved = restart(Search.start(ROWS, SIZES), fresh(asked, PLACES), o), 0
    leader = np.arange(ROWS) - o.rank
    for step in range(ROOM):
        before, going = np.asarray(search.running.tokens), ~np.asarray(search.done)
        search = walk(search, o, table, 1)
        parents = np.asarray(search.parents)
        assert (leader[parents] == leader).all()
        np.testing.assert_array_equal(
            np.asarray(search.running.tokens)[going, :step], before[parents][going, :step]
        )
        assert (parents[~going] == np.arange(ROWS)[~going]).all()
        moved += (parents != np.arange(ROWS)).any()
    assert moved > 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_break_their_request_alone(table, value):
    asked = {0: REQUESTS[0], 1: REQUESTS[1], 3: REQUESTS[3]}
    o = put(asked, PLACES)
    search = walk(restart(Search.start(ROWS, SIZES), fresh(asked, PLACES), o), o, table, 2)
    scores = jnp.asarray(table)[search.last()].at[PLACES[0] + 1, 7].set(value)
    search = choose(search, scores, o, sizes=SIZES)
    assert np.flatnonzero(search.broken).tolist() == [1, 2, 3] and bool(search.done[1:4].all())
    search = walk(search, o, table, ROOM)
    assert [told(search, o, PLACES[i]) for i in (1, 3)] == [alone(table, i) for i in (1, 3)]


def test_a_search_without_any_score_is_broken_and_not_stuck(table):
    asked = {0: REQUESTS[0], 1: REQUESTS[1], 2: REQUESTS[2]}
    o = put(asked, PLACES)
    search = restart(Search.start(ROWS, SIZES), fresh(asked, PLACES), o)
    search = choose(search, jnp.asarray(table)[search.last()].at[1:5].set(-jnp.inf), o, sizes=SIZES)
    assert np.flatnonzero(search.broken).tolist() == [1, 2, 3, 4] and not search.stuck.any()


def test_greedy_rows_take_the_likeliest(table):
    tokens, logprobs, _ = alone(table, 1)
    expected, last = [], 0
    while not expected or (last != drive.EOS and len(expected) < ROOM):
        last = int(table[last].argmax())
        expected.append(last)
    assert tokens == expected
    by_hand = [np.log(np.exp(table[a] - table[a].max()).sum()) for a in [0, *tokens[:-1]]]
    scores = [table[a, b] - table[a].max() for a, b in zip([0, *tokens[:-1]], tokens, strict=True)]
    np.testing.assert_allclose(logprobs, np.array(scores) - by_hand, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("heat", [0.0, 0.5, 8.0])
def test_where_no_token_is_allowed(table, beams, heat):
    """All but one token are suppressed, and that one may not come twice; neighbours go on."""
    only = dataclasses.replace(
        FEW,
        num_beams=beams,
        temperature=heat,
        suppress_tokens=tuple(i for i in range(VOCAB) if i != 4),
        no_repeat_ngram_size=1,
    )
    asked, places = {0: only, 1: FEW}, {0: 2, 1: 8}
    o = put(asked, places)
    search = walk(restart(Search.start(ROWS, SIZES), fresh(asked, places), o), o, table, 2)
    rows = np.arange(2, 2 + beams)
    assert np.flatnonzero(search.stuck).tolist() == rows.tolist() and search.done[rows].all()
    assert search.length[2] == 1 and search.running.tokens[2, 0] == 4
    assert search.length[8] > 1 or search.done[8]


def test_a_search_goes_on_by_the_beam_that_can(table):
    """One of the two tokens that are allowed is a dead end."""
    only = dataclasses.replace(
        FEW,
        num_beams=2,
        suppress_tokens=tuple(i for i in range(VOCAB) if i not in (4, 5)),
        banned_tokens=((4, 4), (4, 5)),
    )
    o = put({0: only}, {0: 2})
    search = restart(Search.start(ROWS, SIZES), fresh({0: only}, {0: 2}), o)
    search = walk(search, o, table, 2)
    assert not search.stuck.any() and (search.running.tokens[2:4, 0] == 5).all()
    assert sorted(search.running.tokens[2:4, 1].tolist()) == [4, 5]


def test_the_last_bit_of_a_score_decides():
    """Log probabilities of the two are equal."""
    o = put({1: FEW}, PLACES)
    search = restart(Search.start(ROWS, SIZES), fresh({1: FEW}, PLACES), o)
    scores = np.full((ROWS, VOCAB), 0.5, np.float32)
    scores[:, 9] = np.nextafter(np.float32(0.5), np.float32(1))
    search = choose(search, scores, o, sizes=SIZES)
    assert search.running.tokens[PLACES[1], 0] == 9


def test_low_scores_are_allowed(table):
    """At a low temperature the best token scores less than a lost beam, and yet it is not forbidden."""
    cold = dataclasses.replace(FEW, temperature=1e-9)
    o = put({1: cold}, PLACES)
    search = restart(Search.start(ROWS, SIZES), fresh({1: cold}, PLACES), o)
    search = walk(search, o, table - 20, ROOM)
    assert not search.stuck.any() and told(search, o, PLACES[1])[0] == alone(table, 1)[0]


@pytest.mark.parametrize("vocab", [1, 5, BLOCKS - 1, BLOCKS, BLOCKS + 1, 7 * BLOCKS, 7 * BLOCKS + 3])
def test_the_best_of_several_is_the_first(vocab):
    rng = np.random.default_rng(vocab)
    scores = rng.integers(-3, 3, (64, vocab)).astype(np.float32)  # a few numbers, so that many tie
    scores[0], scores[1, :-1], scores[2, 0] = -np.inf, -np.inf, 9
    found = best(jnp.asarray(scores))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, scores.argmax(1))


def test_log_probabilities_of_some_tokens_are_those_of_all():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)) * 30 + 70, jnp.float32)
    tokens = jnp.array([[0, 49], [7, 7], [48, 3]])
    found, all = Logprobs.of(logits), jax.nn.log_softmax(logits)
    np.testing.assert_allclose(found.all(), all, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(found.at(tokens), np.take_along_axis(np.asarray(found.all()), tokens, 1))


def test_the_likeliest_are_told_where_one_row_asks(table):
    sizes = Sizes(VOCAB, ROOM, likeliest=2)
    o = blank(2, sizes)
    o.likeliest[0] = 2
    found = Search.start(2, sizes).tell(Logprobs.of(jnp.asarray(table[:2])), o, np.ones(2, bool))
    order = np.argsort(-table[0])[:2]
    np.testing.assert_array_equal(found.token[0], order)
    np.testing.assert_allclose(found.logprob[0], jax.nn.log_softmax(table[0])[order], atol=1e-5)


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_the_score_of_beams_has_no_noise(table, heat):
    warm = dataclasses.replace(FEW, num_beams=3, temperature=heat, length_penalty=0.0)
    o = put({0: warm}, {0: 4})
    search = restart(Search.start(ROWS, SIZES), fresh({0: warm}, {0: 4}), o)
    _, logprobs, score = told(walk(search, o, table, ROOM), o, 4)
    assert logprobs
    np.testing.assert_allclose(score, sum(logprobs), rtol=1e-5)


def test_beams_grow_by_the_best_of_few_tokens():
    """There are fewer tokens than continuations of a search."""
    sizes, few = Sizes(4, ROOM, beams=3, ends=1), dataclasses.replace(FEW, num_beams=3)
    o = options(few, drive.NAMES, sizes)
    scores = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    ours, group = Scores(jnp.asarray(scores), jnp.asarray(scores)), Group.of(o, sizes)
    grown, parent, counted = Search.start(3, sizes).grow(ours, Logprobs.of(ours.score), o, sizes, group)
    rows, tokens = np.unravel_index(np.argsort(-scores, axis=None)[:6], scores.shape)
    for row in range(3):
        np.testing.assert_array_equal(parent[row], rows)
        np.testing.assert_array_equal(grown.token[row], tokens)
        np.testing.assert_array_equal(grown.score[row], scores[rows, tokens])
    assert counted.all()


def test_a_row_beside_beams_is_processed_by_its_scores(table):
    """By log probabilities, which are all negative, this penalty would choose other tokens."""
    penalised = dataclasses.replace(FEW, repetition_penalty=0.2)
    asked = {0: REQUESTS[0], 1: penalised}
    o = put(asked, PLACES)
    search = walk(restart(Search.start(ROWS, SIZES), fresh(asked, PLACES), o), o, table, ROOM)
    expected, last = [], 0
    while not expected or (last != drive.EOS and len(expected) < ROOM):
        scores, seen = table[last].copy(), np.unique(np.array(expected, int))
        scores[seen] = np.where(scores[seen] < 0, scores[seen] * 0.2, scores[seen] / 0.2)
        last = int(scores.argmax())
        expected.append(last)
    assert told(search, o, PLACES[1])[0] == expected
