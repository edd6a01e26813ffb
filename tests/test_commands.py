"""The command lines as a user types them, on the bundled models."""

import importlib
import json
import re

import grain  # noqa: F401  it defines flags, which flagsaver would forget
import numpy as np
import pytest
from absl.testing import flagsaver
from conftest import run_command
from PIL import Image

import omnifusion_jax as of
from omnifusion_jax import sharding
from omnifusion_jax.cli import command
from omnifusion_jax.data.questions import English, caption
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.synthetic import render, scene_and_rng


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six held-out pictures and how many shapes each shows."""
    folder = tmp_path_factory.mktemp("pictures")
    counts = []
    for i in range(6):
        scene, rng = scene_and_rng(1_000_000 + i, "held-out")
        Image.fromarray(render(scene, rng)).save(folder / f"{i}.png")
        counts.append(str(len(scene.things)))
        assert caption(scene, English)
    return folder, counts


def test_the_bundled_model_answers_from_python(pictures):
    folder, counts = pictures
    model = of.load("omnifusion-tiny")
    ask = lambda text: [
        of.Request(images=[folder / f"{i}.png"], messages=[{"role": "user", "content": text}])
        for i in range(6)
    ]
    english = [a.text for a in model.generate(ask(English.count))]
    assert sum(a == b for a, b in zip(english, counts, strict=True)) >= 5
    russian = model.generate(ask("Сколько здесь фигур?"))
    assert sum(a.text == b for a, b in zip(russian, counts, strict=True)) >= 5
    assert all(
        a.finish_reason == "stop" and a.tokens[-1] == model.tokenizer.eos and a.logprob < 0 for a in russian
    )
    official = model.generate(ask("Describe the picture."), of.GenerationConfig.official())
    assert all(a.text for a in official)
    logits = model.logits(ask(English.count)[:1])
    assert logits[0].shape[1] == model.config.decoder.vocab and np.isfinite(logits[0]).all()


def test_a_mesh_gives_the_same_answers(pictures):
    folder, _ = pictures
    asked = [
        of.Request(images=[folder / f"{i}.png"], messages=[{"role": "user", "content": English.describe}])
        for i in range(4)
    ]
    alone = of.load("omnifusion-tiny").generate(asked)
    spread = of.load("omnifusion-tiny", mesh=sharding.make_mesh(data=1, fsdp=4, tensor=2)).generate(asked)
    assert [a.tokens for a in alone] == [a.tokens for a in spread]


def test_convert_there_and_back_keeps_every_answer(pictures, tmp_path):
    folder, _ = pictures
    asked = [of.Request(images=[folder / "0.png"], messages=[{"role": "user", "content": English.describe}])]
    before = of.load("omnifusion-tiny").logits(asked)[0]
    assert "image/adapter" in run_command(
        "convert", "--source=omnifusion-tiny", f"--output={tmp_path / 'native'}"
    )
    pytest.importorskip("torch")
    run_command(
        "convert", f"--source={tmp_path / 'native'}", f"--output={tmp_path / 'original'}", "--to=omnifusion"
    )
    for name in ("native", "original"):
        np.testing.assert_array_equal(of.load(str(tmp_path / name)).logits(asked)[0], before)


def test_generate_answers_a_file_and_goes_on_with_a_half_written_one(pictures, tmp_path):
    folder, counts = pictures
    lines = [
        {"id": f"q{i}", "images": [f"{i}.png"], "messages": [{"role": "user", "content": English.count}]}
        for i in range(3)
    ]
    lines.append({"id": "bad", "images": ["nowhere.png"], "messages": [{"role": "user", "content": "What?"}]})
    lines.append(
        {
            "id": "llava",
            "image": "4.png",
            "conversations": [{"from": "human", "value": "<image>\n" + English.count}],
        }
    )
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)) + "\n")
    arguments = (
        f"--input={source}",
        f"--output={target}",
        f"--images={folder}",
        "--dtype=bfloat16",
        "--generation.max_new_tokens=8",
    )
    assert "5 answers, 1 of them errors; the first error is line 4;" in run_command("generate", *arguments)
    assert (
        json.loads((tmp_path / "out.jsonl.header.json").read_text())["dtype"] == "bfloat16"
    )  # not what a CPU has by itself
    whole = target.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "bad", "llava"]
    assert rows[3]["finish_reason"] == "error" and "nowhere.png" in rows[3]["error"]
    assert sum(rows[i]["text"] == counts[i] for i in (0, 1, 2, 4)) >= 3
    lines_of = lambda text: [line for line in text.splitlines() if '"bad"' not in line]
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(folder / "nowhere.png")  # now it is there
    target.write_text(
        "".join(whole.splitlines(keepends=True)[:4]) + whole.splitlines()[4][:20]
    )  # cut off in the last line
    assert "5 answers, 0 of them errors" in run_command("generate", *arguments, "--retry_errors")
    assert lines_of(target.read_text()) == lines_of(whole)
    source.write_text(json.dumps(lines[0]) + "\n")
    shared = (f"--input={source}", f"--output={tmp_path / 'shared.jsonl'}", "--host=0", "--of=2")
    assert "0 answers, 0 of them errors" in run_command("generate", *shared)  # which is no failure


def test_chat_talks_in_a_pipe(pictures):
    folder, counts = pictures
    said = run_command(
        "chat",
        f"--image={folder / '0.png'}",
        "--dtype=float32",
        given=f"{English.count}\n{English.describe}\n",
    )
    first = {"role": "user", "content": English.count}
    then = [first, {"role": "assistant", "content": counts[0]}, {"role": "user", "content": English.describe}]
    answers = of.load("omnifusion-tiny").generate(
        [of.Request(turns, [folder / "0.png"]) for turns in ([first], then)]
    )
    shown = f"[picture 1: {folder / '0.png'}, 96 x 96]"
    assert said.splitlines() == [shown, counts[0], answers[1].text] and answers[0].text == counts[0]


def test_training_runs_resumes_and_is_loaded(tmp_path, capsys):
    """Both phases for a few steps; the first is asked for more steps than it was begun with."""
    short = ("--config.batch_size=2", "--config.log_every=1", "--config.checkpoint.every_steps=2")
    pretrain = ("--config=tiny:pretrain", *short, f"--workdir={tmp_path / 'one'}")
    said = run_command("train", *pretrain, "--config.steps=2")
    assert "trained  image/adapter" in said and "frozen   decoder" in said and "[[" in said
    assert (
        re.search(
            r"^As the config file says, except:\n(  .*\n)*  steps +2  \(not 250\)\n", said, re.MULTILINE
        )
        and "image_size" not in said
    )
    assert (
        json.loads((tmp_path / "one" / "config.json").read_text())["model"]["image"]["encoders"][0][
            "image_size"
        ]
        == 96
    )  # all of it
    said = train_fails(capsys, *pretrain, "--config.steps=4")
    assert "steps: 2 -> 4" in said and "--allow_change" in said and "Traceback" not in said
    said = run_command("train", *pretrain, "--config.steps=4", "--allow_change")
    assert "resuming from step 2" in said and "steps: 2 -> 4" in said
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4]
    sft = (
        "--config=configs/tiny.py:sft",
        f"--config.init_from={tmp_path / 'one' / 'model'}",
        *short,
        "--config.eval.count=8",
        "--config.eval.every_steps=1",
        "--config.eval.loss=true",
        "--config.checkpoint.keep_best=loss",
    )
    said = run_command("train", *sft, "--config.steps=2", f"--workdir={tmp_path / 'two'}")
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    source = open_source("synthetic:held-out", "", 6)
    asked = [source[i] for i in range(8)]  # of one question each
    requests = [
        of.Request(
            [{"role": "user", "content": d.turns[0][1].replace("<image>", "").strip()}], list(d.images)
        )
        for d in asked
    ]
    answers = of.load(str(tmp_path / "two" / "model")).generate(
        requests, of.GenerationConfig(max_new_tokens=32)
    )
    right = sum(a.text.strip() == d.turns[1][1].strip() for a, d in zip(answers, asked, strict=True))
    assert (
        summary["eval/accuracy"] == right / 8
        and summary["eval/questions"] == 8
        and "eval/blind_accuracy" in summary
    )
    cards = (tmp_path / "two" / "report.html").read_text()
    assert cards.count("class='card") == 8 and cards.count("class='card wrong'") == 8 - right
    with pytest.raises(of.CheckpointError, match="holds only image/adapter, special"):
        of.load(str(tmp_path / "one" / "model"))
    lines = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["eval/loss"] for row in lines if "eval/loss" in row}
    best = min(losses, key=losses.get)
    assert (summary["best/step"], summary["best/loss"]) == (best, losses[best]) and set(losses) == {1, 2}
    assert re.search(rf"^best/step +{best}$", said, re.MULTILINE) and f"{tmp_path / 'two'}/best" in said
    assert summary["eval/loss"] == losses[2]
    figures, _ = of.evaluate(str(tmp_path / "two" / "best"), "synthetic:held-out", count=8)
    (accuracy,) = (row["eval/accuracy"] for row in lines if row["step"] == best and "eval/accuracy" in row)
    assert figures["accuracy"] == accuracy

    said = train_prints(capsys, *pretrain, "--config.steps=4", "--replay=4", "--config.mesh.data=1")
    assert "step 4 of" in said and "from the checkpoint of step 2" in said
    loss = json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[3])["train/loss"]
    (again,) = re.findall(r"step 4 again: loss (\S+), gradient norm", said)
    assert float(again) == pytest.approx(loss, rel=2e-3) and said.count(" targets  record ") == 2


def train_prints(capsys, *arguments):
    """What the command line `train` prints, without another process."""
    train = importlib.import_module("omnifusion_jax.train")
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        command.run(train.main, train.CONFIG, argv=["train", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def train_fails(capsys, *arguments):
    """What the command line `train` says on its way to exit status 1, without another process."""
    train = importlib.import_module("omnifusion_jax.train")
    assert callable(of.train)  # still
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        command.run(train.main, train.CONFIG, argv=["train", *arguments])
    said, code = capsys.readouterr().err, ended.value.code
    assert code == 1 or isinstance(code, str)  # which is printed, and the status 1
    return said + (code if isinstance(code, str) else "")


def test_a_run_that_learned_nothing_is_no_success(tmp_path):
    """Its model is written all the same."""
    options = (
        "--config.steps=12",
        "--config.batch_size=2",
        "--config.log_every=4",
        "--config.optimizer.learning_rate=1e6",
    )
    said = run_command(
        "train", "--config=configs/tiny.py:pretrain", *options, f"--workdir={tmp_path}", fails=True
    )
    (problem,) = json.loads((tmp_path / "summary.json").read_text())["problems"]
    assert f"problem: {problem}" in said and "gradient" in problem and "Traceback" not in said
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/tiny.py:nope"], "no variant 'nope'; choose from"),
        (["--config=tiny:sft", "--config.init_from=/nowhere"], "/nowhere"),
        (
            ["--config=tiny:sft", "--config.init_from=", "--config.data.path=nowhere.json"],
            "nowhere.json does not exist",
        ),
        (["--config=tiny:pretrain", "--config.tokenizer=/nowhere"], "/nowhere/tokenizer.json is missing"),
        (["--config=tiny:pretrain", "--config.steps=0"], "steps is 0"),
        (["--config=tiny:pretrain", "--config.model.preset=nope"], "no model preset 'nope'; choose from"),
    ],
)
def test_a_run_that_cannot_start_says_why_in_a_line(tmp_path, capsys, arguments, message):
    said = train_fails(capsys, *arguments, f"--workdir={tmp_path}")
    assert message in said and said.startswith("error: ") and len(said.splitlines()) == 1


def test_a_misspelt_field_starts_nothing(tmp_path, capsys):
    message = train_fails(
        capsys, "--config=tiny:encoder", f"--workdir={tmp_path / 'run'}", "--config.optimizer.learning_rat=1"
    )
    assert message.startswith(
        "error: there is no flag --config.optimizer.learning_rat; is --config.optimizer.learning_rate meant?"
    )
    assert not (tmp_path / "run").exists()
