"""Real pictures and dialogues with the real tokenizer, learned by heart: configs/tiny.py:real in short."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

DATA = ROOT.parent / "shared" / "data"

pytestmark = [
    pytest.mark.sweep,  # a minute of training
    pytest.mark.skipif(not (DATA / "real_dialogues").is_dir(), reason=f"{DATA} is not here"),
]


def test_a_few_real_dialogues_come_back_word_for_word(tmp_path):
    records = json.loads((DATA / "real_dialogues" / "dialogues.json").read_text())
    few = [r for r in records if r["id"] in ("page_spb", "bag_ru", "receipt_ru", "text_en")]
    assert len(few) == 4
    file = tmp_path / "few.json"
    file.write_text(json.dumps(few))
    options = {"steps": 40, "batch_size": 4, "data.path": file, "eval.path": file, "data.max_length": 96}
    command = [sys.executable, "-m", "omnifusion_jax.train", "--config=configs/tiny.py:real"]
    command += [f"--config.{name}={value}" for name, value in options.items()]
    fast = {"XLA_FLAGS": ""}  # a step takes a quarter of the time when it is compiled with care
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | fast,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["eval/questions"] == 5
    assert summary["eval/accuracy"] >= 0.95
