"""What comes with the package: small, without pickles, and as good as the documents say."""

import json

import numpy as np
import pytest

import omnifusion_jax as of
from omnifusion_jax.checkpoints.storage.bundled import ASSETS, BUNDLED, locate
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.evaluation.exact_match import Record, exact_match
from omnifusion_jax.evaluation.report import curve, write_report


def test_the_assets_are_small_and_hold_no_pickles():
    files = [file for file in ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 12_000_000
    assert {file.suffix for file in files} <= {".json", ".safetensors"}
    assert all(locate(name).is_dir() for name in BUNDLED)


def test_the_bundled_model_answers_nine_of_ten_questions_about_held_out_pictures():
    model = of.load("omnifusion-tiny")
    figures, records = exact_match(model, open_source("synthetic:held-out", "", 6), 240, blind=True)
    assert figures["questions"] == len(records) == 240
    assert figures["accuracy"] >= 0.90
    assert figures["blind_accuracy"] <= 0.40
    assert {r.question[0] > "z" for r in records} == {True, False}  # Russian and English


def test_a_report_shows_right_and_wrong_answers_and_escapes_what_is_said(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    records = [
        Record((picture,), "What <b>is</b> it?", "a & b", "a & b"),
        Record((picture,), "And this?", "one", "<script>two</script>", blind="three"),
        Record((), "No picture?", "none", "none"),
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"eval/accuracy": 2 / 3}))
    lines = [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/bad_steps": 1},
        {"step": 3, "train/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_report(tmp_path, records, earlier=tmp_path / "nowhere")
    page = (tmp_path / "report.html").read_text()
    assert page.count("class='card'") == 2 and page.count("class='card wrong'") == 1
    assert "<script>" not in page and "What &lt;b&gt;is" in page and "a &amp; b" in page
    assert "truth: one" in page and "to a blank picture: three" in page and "0.6667" in page
    assert page.count("data:image/png;base64") == 2 and page.count("<polyline") == 1


@pytest.mark.parametrize("points", [[], [(1, 2.0)]])
def test_a_curve_needs_two_points(points):
    assert "fewer than two" in curve(points)
