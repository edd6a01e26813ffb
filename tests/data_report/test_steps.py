"""Which records are in which step: what the batches of the run hold."""

import dataclasses
import re

import numpy as np
import pytest
import talks
from talks import talk

from omnifusion_jax.batch import TEXT
from omnifusion_jax.data.rows import Rows
from omnifusion_jax.data_report.steps import composition, span
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.tables import OBJECTIVES

SKIP = {"on_bad_sample": "skip", "bad_share": 0.5}


@pytest.fixture
def sets(tmp_path):
    """Two files whose records say their number in the mixture; 1 of 3, 5, 8 and 41 cannot be used."""
    rng = np.random.default_rng(0)
    talks.picture(tmp_path / "good.png")
    talks.broken(tmp_path / "broken.png")  # which only its pixels show

    def records(first, count):
        numbers = range(first, first + count)
        return [
            talk(i, f"number {i} is " + "cat " * rng.integers(1, 30), image="good.png" if i % 3 else None)
            for i in numbers
        ]

    a, b = records(0, 30), records(30, 14)
    a[3], a[5], a[8] = talk(3, image="gone.png"), "{", talk(8, "cat " * 400)
    b[11] = talk(41, image="broken.png")
    return talks.write(tmp_path, a, "a.jsonl"), talks.write(tmp_path, b, "b.json"), tmp_path


def numbers(batch, tokenizer):
    """For each row of a batch the numbers that its dialogues say."""
    found = []
    for tokens, kind, segments in zip(batch.tokens, batch.kind, batch.segments, strict=True):
        texts = [
            tokenizer.decode(tokens[(segments == s) & (kind == TEXT)]) for s in range(1, segments.max() + 1)
        ]
        found.append([int(re.search(r"number (\d+) is", text)[1]) for text in texts])
    return found


def steps_of_training(c, count):
    batches = OBJECTIVES["answers"].batches(c, talks.tokenizer())
    try:
        return [numbers(next(batches), talks.tokenizer()) for _ in range(count)]
    finally:
        batches.close()


def composed(c, first, last, processes=0):
    return list(composition(c, talks.opened(c), range(first, last + 1), processes))


@pytest.mark.parametrize("packing", [{}, {"packing": True, "window": 5}])
@pytest.mark.parametrize("which", ["one set", "a mixture"])
def test_steps_with_bad_records_are_those_of_training(sets, packing, which):
    *files, folder = sets
    files = files if which == "a mixture" else files[:1]
    c = talks.config(*files, images=folder, batch_size=3, on_long="skip", **SKIP, **packing)
    if which == "a mixture":
        c.data.sets = (c.data.sets[0], dataclasses.replace(c.data.sets[1], repeats=1.5))
    c.seed = 4
    expected = steps_of_training(c, 16)  # more than an epoch
    assert composed(c, 1, 16) == list(enumerate(expected, 1))
    assert composed(c, 12, 13) == list(enumerate(expected, 1))[11:13]
    assert composed(c, 15, 16, processes=2) == list(enumerate(expected, 1))[14:]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_that_leaves_nothing_out_is_not_read_from_its_start(sets, tmp_path, shuffle, monkeypatch):
    records = [talk(i, f"number {i} is a cat") for i in range(37)]
    c = talks.config(talks.write(tmp_path, records), batch_size=3, shuffle=shuffle)
    expected = steps_of_training(c, 40)
    taken, following = [], Rows.following
    monkeypatch.setattr(Rows, "following", lambda self, row: taken.append(1) or following(self, row))
    assert composed(c, 38, 40) == list(enumerate(expected, 1))[37:]
    assert len(taken) == 9


def test_a_run_that_leaves_long_dialogues_out_is_read_from_its_start(tmp_path):
    """Even though any other bad record ends it."""
    records = [talk(i, f"number {i} is " + "cat " * (400 if i % 4 == 1 else 1)) for i in range(22)]
    c = talks.config(talks.write(tmp_path, records), batch_size=3, on_long="skip")
    expected = steps_of_training(c, 9)
    assert composed(c, 7, 9) == list(enumerate(expected, 1))[6:]


def test_records_in_their_own_order_may_begin_with_bad_ones(tmp_path):
    """As in training: they tell nothing of the others."""
    records = [*["{"] * 12, *(talk(i, f"number {i} is a cat") for i in range(12, 200))]
    settings = {"shuffle": False, "on_bad_sample": "skip", "bad_share": 0.1}
    c = talks.config(talks.write(tmp_path, records), batch_size=3, **settings)
    assert composed(c, 1, 1) == [(1, [[12], [13], [14]])]


def test_a_run_that_ends_there_says_why(sets):
    a, _, folder = sets
    c = talks.config(a, images=folder, batch_size=2, shuffle=False)
    found = composition(c, talks.opened(c), range(1, 5), 0)
    assert next(found) == (1, [[0], [1]])
    with pytest.raises(DataError, match=r"gone\.png: there is no such file"):
        list(found)


def test_which_steps():
    assert span("100:200", 1000) == range(100, 201)
    assert span("7", 7) == range(7, 8)
    for text, words in (
        ("a:b", "two numbers are expected"),
        ("1:2:3", "two numbers are expected"),
        ("", "two numbers are expected"),
        ("0:3", "counted from 1"),
        ("5:4", "the first before the last"),
        ("5:1001", r"the run has 1000 steps \(config.steps\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            span(text, 1000)
