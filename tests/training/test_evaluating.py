"""When a run is evaluated, which step is the best, and what is shown of it."""

import io
import json

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from omnifusion_jax.config import CheckpointConfig, DataConfig, EvalConfig, TrainConfig
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.evaluation.exact_match import Record
from omnifusion_jax.evaluation.report import write_report
from omnifusion_jax.training.evaluating import SAMPLES, Evaluations
from omnifusion_jax.training.monitor import Monitor


def config(best="", every=2):
    return TrainConfig(
        steps=9,
        data=DataConfig(path="a.json"),
        train_parts=((".*", 1.0),),
        eval=EvalConfig(path="b.json", every_steps=every, loss=True),
        checkpoint=CheckpointConfig(keep_best=best),
    )


def nothing(arrays):
    return {}, []


@pytest.mark.parametrize(("figure", "best"), [("accuracy", 4), ("loss", 6), ("blind_accuracy", 2)])
def test_which_way_is_better_is_said_by_the_name(figure, best):
    found = Evaluations(nothing, config(figure))
    lines = [(2, 0.5, 2.0, 0.9), (4, 0.75, 1.5, 0.2), (6, 0.75, 1.25, 0.3), (8, 0.25, 3.0, 0.4)]
    names = ("step", "eval/accuracy", "eval/loss", "eval/blind_accuracy")
    found.remember([dict(zip(names, line, strict=True)) for line in lines] + [{"step": 8, "train/loss": 0.1}])
    assert found.best([8, 6, 4, 2]) == best and found.best([1, 3]) is None
    assert found.best([8]) == 8


def test_when_it_is_due():
    assert [n for n in range(10) if Evaluations(nothing, config()).due(n)] == [2, 4, 6, 8]
    assert not any(Evaluations(nothing, config(every=0)).due(n) for n in range(10))
    assert not any(Evaluations(None, config()).due(n) for n in range(10))
    decides = Evaluations(nothing, config("loss")).decides
    assert decides(4) and not decides(5) and not Evaluations(nothing, config()).decides(4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"best": "speed"}, "ends in accuracy .* or in loss"),
        ({"best": "accuracy", "every": 0}, "set eval.every_steps"),
    ],
)
def test_a_best_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values).validate()


def test_a_figure_that_no_evaluation_gives():
    with pytest.raises(ConfigError, match="this run evaluates nothing"):
        Evaluations(None, config("accuracy"))
    found = Evaluations(lambda arrays: ({"loss": 1.0}, []), config("accuracy"))
    with pytest.raises(ConfigError, match="needs eval/accuracy; the evaluation gives eval/loss"):
        found(2, {}, None)


def records(answer):
    red = Image.new("RGB", (600, 300), "red")
    return [Record((red,), f"What is {i}?", "a\u2028b", f"{answer} {i}") for i in range(SAMPLES + 3)]


def events(folder):
    """{(step, tag): value} of a TensorBoard file, read with its own record format."""
    [file] = folder.iterdir()
    data, found = file.read_bytes(), {}
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(event.step, value.tag): value for value in event.summary.value}
        data = data[16 + size :]
    return found


def test_the_same_few_answers_are_shown_after_every_evaluation(tmp_path):
    """In TensorBoard, in samples.jsonl and in the report, which forgets what a resumed run does again."""
    c = config()
    for begun, said in ((0, {2: "dog", 4: "cow"}), (2, {4: "cat", 9: "fox"})):
        monitor = Monitor(tmp_path, c.steps, begun, 10)
        answers = iter(said.values())
        evaluations = Evaluations(lambda arrays, answers=answers: ({}, records(next(answers))), c)
        for step in said:
            evaluations(step, {}, monitor)
        monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text("utf-8").split("\n") if line]
    assert [line["step"] for line in lines] == [2, 4, 9]
    assert [len(line["samples"]) for line in lines] == [SAMPLES] * 3
    assert lines[1]["samples"][5] == {"question": "What is 5?", "truth": "a\u2028b", "answer": "cat 5"}
    (tmp_path / "summary.json").write_text("{}")
    write_report(tmp_path, evaluations.records)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "step 2: dog 0" in page and "step 4: cat 7" in page and "cow" not in page
    assert "step 9: fox" not in page and page.count("fox 0") == 1  # the last is what the card shows
    assert f"dog {SAMPLES}" not in page and f"fox {SAMPLES}" in page


def test_tensorboard_has_the_pictures_once_and_the_texts_each_time(tmp_path):
    monitor = Monitor(tmp_path, 9, 0, 10)
    for step, answer in ((2, "dog"), (4, "cat")):
        monitor.show(step, records(answer)[:SAMPLES])
    monitor.close()
    found = events(tmp_path / "tensorboard")
    texts = {key: value.tensor.string_val[0].decode() for key, value in found.items() if "text" in key[1]}
    assert set(texts) == {(step, f"samples/{i}/text_summary") for step in (2, 4) for i in range(SAMPLES)}
    assert texts[4, "samples/3/text_summary"] == "What is 3?\n\n* truth: a\u2028b\n* answer: cat 3"
    pictures = {key: value.image for key, value in found.items() if "text" not in key[1]}
    assert set(pictures) == {(2, f"samples/{i}") for i in range(SAMPLES)}
    shown = Image.open(io.BytesIO(pictures[2, "samples/0"].encoded_image_string))
    assert shown.size == (256, 128) and shown.getpixel((9, 9)) == (255, 0, 0)
