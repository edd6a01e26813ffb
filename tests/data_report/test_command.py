"""python -m omnifusion_jax.check_data: what it says, writes and returns."""

import json
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pytest
import talks
from conftest import ROOT
from in_turn import in_turn
from pyarrow import parquet
from talks import talk

CONFIG = """
import os
from omnifusion_jax.config import SetConfig
from omnifusion_jax.data.sources import JsonSource
from omnifusion_jax.shipped import tiny
from omnifusion_jax.tables import SOURCES

class Deadly(JsonSource):
    def __getitem__(self, i):
        os._exit(3)

@SOURCES.row("deadly")
def open_deadly(rest, images, side):
    return Deadly(rest)

def get_config(name=""):
    config = tiny.get_config("pretrain")
    if name == "columns":
        config.data.path, config.data.images = "shown.parquet", "pictures"
        return config
    config.data.path = ""
    config.data.sets = (
        SetConfig(name="talks", path="good.jsonl"),
        SetConfig(name="deadly" if name else "words", path=f"{name}good.jsonl", layout="text"),
    )
    config.batch_size, config.data.max_length = 2, 200
    return config
"""
COMMANDS = {
    "good": ["--data=good.jsonl", "--output=good", "--num_workers=1"],
    "bad": ["--data=bad.jsonl", "--images=.", "--output=bad", "--fix=clean.json", "--num_workers=2"],
    "clean": ["--data=clean.json", "--images=.", "--output=clean", "--num_workers=1"],
    "long": [
        "--data=long.jsonl",
        "--output=long",
        "--config.data.on_long=skip",
        "--config.data.max_length=100",
        "--num_workers=1",
    ],
    "mixture": ["--config=mine.py", "--output=mixture", "--num_workers=1"],
    "columns": ["--config=mine.py:columns", "--output=columns", "--fix=columns.json", "--num_workers=1"],
    "another set": [
        "--config=mine.py",
        "--data=bad.jsonl",
        "--images=.",
        "--output=other",
        "--num_workers=1",
    ],
    "other dialogues": ["--data=bad.jsonl", "--images=.", "--config.objective=patches"],
    "negative": ["--data=good.jsonl", "--num_workers=0"],
    "died": ["--config=mine.py:deadly:", "--output=died", "--num_workers=1"],
    "steps": ["--data=good.jsonl", "--steps=3:4", "--config.batch_size=2", "--num_workers=1"],
    "steps end": ["--data=bad.jsonl", "--images=.", "--steps=1", "--config.batch_size=4", "--num_workers=1"],
    "no such steps": ["--data=good.jsonl", "--steps=3:4000"],
    "nothing": [],
    "no such flag": ["--dta=good.jsonl"],
    "no such file": ["--data=gone.jsonl"],
    "images alone": ["--config=mine.py", "--images=."],
    "no dialogues": ["--config=tiny:encoder"],
    "few tokens": ["--data=good.jsonl", "--config.model.decoder.vocab=100"],
    "overwriting": ["--data=good.jsonl", "--fix=there.json"],
    "no folder": ["--data=good.jsonl", "--output=good.jsonl"],
    "help": ["--help"],
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, {name: (status, stdout, stderr)})."""
    folder = tmp_path_factory.mktemp("check")
    talks.picture(folder / "a.png")
    talks.write(folder, [talk(i, f"number {i}") for i in range(7)], "good.jsonl")
    bad = [talk(0, image="a.png"), talk("\x1b[2J", image="gone.png"), talk(2), "{"]
    talks.write(folder, bad, "bad.jsonl")
    talks.write(folder, [talk(0), talk(1, "cat " * 200)], "long.jsonl")
    talks.write(folder, [talk(0)], "there.json")
    (folder / "mine.py").write_text(CONFIG)
    (folder / "pictures").mkdir()
    talks.picture(folder / "pictures" / "b.png")
    parquet.write_table(pa.Table.from_pylist([talk(0, image="b.png"), talk(1)]), folder / "shown.parquet")
    (folder / "died").mkdir()
    (folder / "died" / "report.json").write_text("of an earlier check")
    return folder, in_turn("check_data", COMMANDS, folder, failed=2)


STATUSES = {
    "good": 0,
    "columns": 0,
    "clean": 0,
    "long": 0,
    "mixture": 0,
    "steps": 0,
    "help": 0,
    "bad": 1,
    "another set": 1,
    "steps end": 1,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_status(ran, name):
    status, out, err = ran[1][name]
    assert status == STATUSES.get(name, 2), (out, err)
    assert "Traceback" not in out + err


def files(folder):
    return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []


def test_a_good_set(ran):
    folder, found = ran
    lines = found["good"][1].splitlines()
    assert lines[0].startswith("tokenizer ") and "omnifusion-tiny-decoder (852 tokens)" in lines[0]
    assert lines[0].endswith("layout omnifusion, max_length 2,048")
    assert "records                      7" in lines[2] and "nothing wrong with 7 records" in lines
    assert lines[-1] == "good/report.json, good/report.html" and len(files(folder / "good")) == 2


def test_a_bad_set_and_its_clean_one(ran):
    folder, found = ran
    out = found["bad"][1]
    assert "1 x missing\n    bad.jsonl:2 (id " in out and "2 of 4 records have problems\n" in out
    assert "1 x not_json\n    bad.jsonl:4: not JSON" in out
    assert "\x1b" not in out and "\\x1b[2J" in out  # an id must not clear the screen
    assert out.endswith("clean.json: 2 records without a problem\n")
    assert json.loads((folder / "bad/report.json").read_text())["all"]["usable"] == 2
    assert [one["id"] for one in json.loads((folder / "clean.json").read_text())] == ["r0", "r2"]
    assert "nothing wrong with 2 records" in found["clean"][1]


def test_a_clean_set_names_pictures_as_the_config_does(ran):
    folder, found = ran
    assert found["columns"][1].endswith("columns.json: 2 records without a problem\n")
    assert json.loads((folder / "columns.json").read_text())[0]["images"] == ["b.png"]


def test_dialogues_that_are_left_out_for_their_length_are_told(ran):
    assert "  too long, left out         1\n" in ran[1]["long"][1]


def test_a_mixture(ran):
    lines = ran[1]["mixture"][1].splitlines()
    assert lines[0].endswith("layout talks: omnifusion, words: text, max_length 200")
    assert lines[1].split() == ["talks", "words", "all"] and lines[2].split() == ["records", "7", "7", "14"]


def test_a_set_that_is_named_takes_the_place_of_the_config_s(ran):
    folder, found = ran
    lines = found["another set"][1].splitlines()
    assert lines[0].endswith("layout omnifusion, max_length 200") and lines[1].split() == ["data"]
    assert lines[2].split() == ["records", "4"] and "2 of 4 records have problems" in lines
    assert json.loads((folder / "other/report.json").read_text())["all"]["pictures"]["number"] == 1


def test_a_process_that_died(ran):
    folder, found = ran
    _, out, _err = found["died"]
    assert "the check itself failed: a process that reads data ended with status 3" in out
    assert "It was reading deadly: good.jsonl:1 to deadly: good.jsonl:7\n" in out
    assert "PARTIAL: 7 of 14 records were looked at\nno report is written\n" in out
    assert files(folder / "died") == []


def test_steps_are_printed(ran):
    _, found = ran
    _head, *lines = found["steps"][1].splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        f"step {step} row {row}" for step in (3, 4) for row in (0, 1)
    ]
    assert all(line.partition(": ")[2].startswith("good.jsonl:") for line in lines)
    assert "the run ends there: bad.jsonl:" in found["steps end"][1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no such steps", "--steps=3:4000: the run has 1000 steps (config.steps)"),
        ("nothing", "give --data=FILE, or the --config of a run"),
        ("no such flag", "there is no flag --dta; is --data meant? --help lists all"),
        ("no such file", "gone.jsonl does not exist"),
        ("images alone", "--images goes with --data"),
        ("no dialogues", "objective=patches reads data in a way of its own"),
        ("other dialogues", "objective=patches reads data in a way of its own"),
        ("negative", "num_workers"),
        ("few tokens", "852"),
        ("overwriting", "--fix=there.json is there already, and is not overwritten"),
        ("no folder", "--output=good.jsonl cannot be written: File exists. Give another"),
    ],
)
def test_what_is_wrong_with_the_command_is_one_line(ran, name, words):
    _, _out, err = ran[1][name]
    (line,) = err.splitlines()
    assert line.startswith("error: ") and words in line


def test_ctrl_c(tmp_path):
    """What was found so far is said to be partial, and nothing is left behind."""
    lines = [json.dumps(talk(i, f"number {i}")) for i in range(2000)] * 100
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    command = ["-m", "omnifusion_jax.check_data", "--data=d.jsonl", "--output=out", "--num_workers=2"]
    run = subprocess.Popen(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert run.stdout.readline().startswith("tokenizer ")
        time.sleep(4)
        workers = children(run.pid)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130 and "Traceback" not in err, err
    assert "of 200,000 records were looked at\nno report is written\n" in out and "PARTIAL" in out
    assert files(tmp_path / "out") == []
    assert len(workers) == 2 and not any(map(alive, workers))


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(one) for one in found.stdout.split()]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
