"""What is tried, and what is chosen, when the memory that each try takes is known."""

import pytest

from omnifusion_jax import shipped
from omnifusion_jax.planning import report
from omnifusion_jax.planning.compiled import Weighed
from omnifusion_jax.planning.search import best, search, with_rows

TAKES = {"none": 30, "dots": 9, "full": 3}  # a row, beside a basis of 4


def looked(memory, shards=16):
    """Every try for a device of this memory."""

    def weigh(config):
        total = 4 + TAKES[config.remat] * config.batch_size // config.grad_accum // shards
        return Weighed(total <= memory, total, {}, 0, (), 0.0)

    return list(search(shipped.load("sft"), shards, weigh))


def test_tries_begin_with_what_fitted_before():
    tried = looked(memory=23)
    assert [(one.remat, one.rows, one.weighed.fits) for one in tried] == [
        ("none", 1, False),
        ("dots", 1, True),
        ("dots", 2, True),
        ("dots", 4, False),
        ("full", 4, True),
        ("full", 8, False),
    ]
    assert best(tried)[:2] == ("dots", 2)


def test_the_advice_are_flags_of_what_was_found():
    """128 rows of 16 devices, two at a time, in 4 portions; the config as it is shipped has 2."""
    found = report.advice(best(looked(memory=23)), shipped.load("sft"), 16)
    assert found == "--config.remat=dots --config.batch_size=128 --config.grad_accum=4"


def test_nothing_may_fit():
    tried = looked(memory=6)
    assert [one.rows for one in tried] == [1, 1, 1] and best(tried) is None
    assert "nothing fits" in report.advice(None, shipped.load("sft"), 16)


@pytest.mark.parametrize(
    ("shards", "rows", "batch_size", "grad_accum"),
    [(16, 1, 128, 8), (16, 2, 128, 4), (64, 2, 128, 1), (256, 1, 256, 1), (48, 1, 144, 3)],
)
def test_rows_of_a_device_at_a_time(shards, rows, batch_size, grad_accum):
    config = with_rows(shipped.load("sft"), shards, rows)
    assert (config.batch_size, config.grad_accum) == (batch_size, grad_accum)
    assert shipped.load("sft").grad_accum == 2
