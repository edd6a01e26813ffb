"""Which finished runs have learned nothing."""

import math

import pytest

from omnifusion_jax.training.verdict import verdict

UNKNOWING = math.log(1000)  # 6.9


def rows(*curve, every=20, norm=1.0):
    """Lines of metrics.jsonl at step 1, then every `every` steps.

    `curve` has losses, or pairs (loss, gradient).
    """
    pairs = [point if isinstance(point, tuple) else (point, norm) for point in curve]
    found = []
    for i, (loss, gradient) in enumerate(pairs):
        figures = {"train/loss": loss, "train/grad_norm": gradient, "train/bad_steps": 0}
        found.append(
            {
                "step": max(1, i * every),
                **{name: value for name, value in figures.items() if math.isfinite(value)},
            }
        )
    return found


NAN = float("nan")
LEARNED = {
    "a fresh decoder": rows(7.0, 6.2, 5.0, 4.0),
    "a fresh decoder, twenty steps": rows(6.95, 6.7),
    "a good model trained on, which hardly moves": rows(1.1, 1.2, 1.15, 1.12),
    "texts a small decoder was not made for, twenty steps": rows(12.0, 9.0),
    "too short to tell": rows(6.95, 6.95, every=4),
    "learned by heart: no loss, and no gradient": rows((7.0, 5.0), (1.0, 1.0), (1e-6, 1e-7), (0.0, 0.0)),
    "a gradient that was 0 for a while": rows((5.0, 3.0), (4.0, 0.0), (4.0, 2.0), (4.0, 2.0)),
    "a gradient that was 0 once, late": rows((5.0, 3.0), (4.0, 2.0), (4.0, 0.0), (4.0, 2.0)),
    "some steps that were skipped": rows((5.0, 3.0), (4.0, 3.0), (NAN, NAN), (3.0, 2.0)),
    "a first step that was skipped": rows((NAN, NAN), (1.3, 2.0), (1.2, 2.0), (1.1, 2.0)),
    "with evaluations": [*rows(5.0, 3.0), {"step": 20, "eval/accuracy": 0.0}],
    "nothing logged": [],
}
FAILED = {
    "gradient": [
        rows((4.3, 0.0), (4.3, 0.0), every=2),  # however short
        rows(
            (4.3, 13.0), (5.2, 4e-7), (4.8, 2e-7), (4.9, 1.5e-7), every=8
        ),  # optimizer.learning_rate=1e6 in phase 1 of the tiny model
    ],
    "knows nothing": [
        rows(7.0, 6.95, 6.93, 6.92),
        rows(2.0, 300.0, 120.0, 50.0),
        rows(12.0, 9.0, 8.5, 8.0, every=50),  # long enough by then
        rows(2.0, 30.0, every=10),
    ],
    "finite": [rows((NAN, NAN), (NAN, NAN), every=2)],
}


@pytest.mark.parametrize("case", LEARNED)
def test_a_run_that_learned_has_no_problem(case):
    assert verdict(LEARNED[case], UNKNOWING) == []


@pytest.mark.parametrize(
    ("word", "lines"), [(word, lines) for word, cases in FAILED.items() for lines in cases]
)
def test_a_run_that_did_not_is_told_what_to_look_at(word, lines):
    (problem,) = verdict(lines, UNKNOWING)
    assert word in problem and "optimizer.learning_rate" in problem and "metrics.jsonl" in problem
