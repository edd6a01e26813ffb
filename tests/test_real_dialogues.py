"""Real pictures and dialogues with the real tokenizer, learned by heart: configs/tiny.py:real in short."""

import json
from pathlib import Path

import pytest
from conftest import run_command

DATA = Path(__file__).parents[1].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(not (DATA / "real_dialogues").is_dir(), reason=f"{DATA} is not here")


def test_a_few_real_dialogues_come_back_word_for_word(tmp_path):
    records = json.loads((DATA / "real_dialogues" / "dialogues.json").read_text())
    few = [r for r in records if r["id"] in ("page_spb", "bag_ru", "receipt_ru", "text_en")]
    assert len(few) == 4
    file = tmp_path / "few.json"
    file.write_text(json.dumps(few))
    run_command(
        "train",
        "--config=configs/tiny.py:real",
        "--config.steps=70",
        "--config.batch_size=4",
        f"--config.data.path={file}",
        f"--config.eval.path={file}",
        "--config.data.max_length=96",
        f"--workdir={tmp_path / 'run'}",
        flags="",
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval/questions"] == 5
    assert summary["eval/accuracy"] >= 0.95
