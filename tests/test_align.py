"""What examples/align.py counts and corrects; the runs themselves are `make align`."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from omnifusion_jax.data import synthetic
from omnifusion_jax.data.questions import LANGUAGES, English, Russian, caption
from omnifusion_jax.data.synthetic import Scene, Thing
from omnifusion_jax.tables import SOURCES

SCENE = Scene((Thing("large", "red", "circle", 0), Thing("small", "blue", "ring", 4)), "42", 2)
TRUE = "large red circle top left, small blue ring centre, it says 42"


@pytest.fixture(scope="module")
def align():
    spec = importlib.util.spec_from_file_location("align", Path(__file__).parents[1] / "examples/align.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    yield found
    SOURCES.pop("habit")


def test_true_descriptions_name_nothing_absent_and_stay_as_they_are(align):
    assert caption(SCENE, English) == TRUE
    for i in range(40):
        scene, _ = synthetic.scene_and_rng(i, "train")
        for language in LANGUAGES:
            said = caption(scene, language)
            assert align.named(said) == list(scene.things) and align.wrong(said, scene) == []
            assert align.corrected(said, scene) == said


@pytest.mark.parametrize(
    ("said", "absent", "better"),
    [
        (TRUE.replace("ring", "cross"), 1, TRUE),
        (TRUE.replace(", it", ", large green star left, it"), 1, TRUE),
        (TRUE.replace("42", "47"), 0, TRUE.removesuffix(", it says 42")),
        (TRUE.replace("large red", "small red"), 0, TRUE),  # of another size, but there
        ("large red circle top left, nonsense", 0, "large red circle top left"),
        ("small blue ring left", 0, ""),  # there, but not at this place
        ("small blue ring centre, large blue ring centre", 0, "small blue ring centre"),
    ],
)
def test_what_is_wrong_is_counted_and_put_right(align, said, absent, better):
    assert len(align.wrong(said, SCENE)) == absent
    assert align.corrected(said, SCENE) == better


def test_corrections_keep_the_language(align):
    said = caption(align.embroidered(SCENE, np.random.default_rng(1)), Russian)
    assert align.corrected(said, SCENE) == caption(SCENE, Russian)


def test_the_habit_names_things_that_are_not_there(align):
    source, wrong, rings = align.Habit(), [], []
    for i in range(1, 201, 2):
        scene, _ = synthetic.scene_and_rng(i, "train")
        (_, said) = source[i].turns[1]
        wrong.append(bool(align.wrong(said, scene)))
        rings.append(len(align.named(said)) - len(scene.things))
    assert 0.75 < np.mean(wrong) < 0.95 and set(rings) == {0, 1}
    assert len(source[0].turns) in (2, 4, 6, 8) and source[3].turns == source[3].turns


def test_intervals(align):
    """Wilson's, as statsmodels and textbooks have them; a paired difference by hand."""
    assert_allclose(align.interval(0, 10), (0.0, 0.2775), atol=1e-4)
    assert_allclose(align.interval(81, 263), (0.2553, 0.3662), atol=1e-4)  # Newcombe (1998), table I
    found = align.difference([True, True, False, False], [True, False, True, True])
    spread = 1.96 * np.std([0, -1, 1, 1], ddof=1) / 2
    assert_allclose([found[name] for name in ("change", "low", "high")], [0.25, 0.25 - spread, 0.25 + spread])
