"""Held-out data: looked at before a run, evaluated by the same programs each time, over all devices."""

import gc
import json

import drive
import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from runs import config

from omnifusion_jax import sharding
from omnifusion_jax.config import MeshConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.evaluation import held_out_loss
from omnifusion_jax.inference.model import Model
from omnifusion_jax.models.axes import placements
from omnifusion_jax.nn import nnx
from omnifusion_jax.tables import OBJECTIVES

ANSWERS = ("A red circle.", "A blue square and a red circle.", "There are two circles to the left of it.")


def talk(*turns, **fields):
    return {**fields, "conversations": [{"from": who, "value": text} for who, text in turns]}


def settings(folder, records, mesh=None, **fields):
    """A config that evaluates such records; pictures are in the same folder."""
    folder.mkdir(exist_ok=True, parents=True)
    for i in range(4):
        Image.new("RGB", (30, 24 + i), (60 * i, 200, 30)).save(folder / f"{i}.png")
    (folder / "held_out.json").write_text(json.dumps(records))
    c = config(mesh or MeshConfig(1, 1), grad_accum=2)
    c.data.max_length = 96
    c.eval.path, c.eval.images, c.eval.max_new_tokens = str(folder / "held_out.json"), str(folder), 4
    for name, value in fields.items():
        setattr(c.eval, name, value)
    return c


def records(count=11):
    """Some with a picture, some without, one and two answers."""
    for i in range(count):
        image = {"image": f"{i % 4}.png"} if i % 3 else {}
        mark = "<image>\n" if image else ""
        turns = [("human", f"{mark}What is it?"), ("gpt", ANSWERS[i % 3])]
        yield talk(*turns, *([("human", "Sure?"), ("gpt", "It is.")] if i % 4 == 1 else []), **image)


def evaluator(c, tokenizer):
    return OBJECTIVES["answers"].evaluator(c, tokenizer)


# --- before the first step


def test_everything_wrong_is_named_at_once(tokenizer, tmp_path):
    long = talk(("human", "What is it?" * 90), ("gpt", "A cat"), id="long")
    lost = talk(("human", "<image>\nWhat?"), ("gpt", "A cat"), image="nowhere.png")
    c = settings(tmp_path, [*records(3), long, lost], loss=True)
    with pytest.raises(DataError) as caught:
        evaluator(c, tokenizer)
    said = str(caught.value)
    assert said.startswith("held-out data: 5 records checked (text, headers of pictures), 2 cannot be used:")
    assert 'id "long"' in said and "nowhere.png" in said and "See to eval.path, eval.images" in said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "nowhere.json"}, "eval.path: nowhere.json does not exist"),
        ({"images": "/nowhere"}, "2 cannot be used"),
        ({"images": "/nowhere", "count": 1}, None),  # the first has no picture, and no other is asked for
        ({"max_new_tokens": 250}, "exceed the model's 256"),
    ],
)
def test_wrong_settings_show_at_the_start(tokenizer, tmp_path, fields, message):
    c = settings(tmp_path, list(records(3)), **fields)
    if message is None:
        assert evaluator(c, tokenizer)
        return
    with pytest.raises(DataError, match=message):
        evaluator(c, tokenizer)


def test_data_without_a_question(tokenizer, tmp_path):
    silent = {"messages": [{"role": "user", "content": "Hm."}]}
    with pytest.raises(DataError, match="hold no question"):
        evaluator(settings(tmp_path, [silent] * 2), tokenizer)
    with pytest.raises(DataError, match="no turn of the assistant"):  # nothing to take a loss of
        evaluator(settings(tmp_path, [silent] * 2, answers=False, loss=True), tokenizer)


def test_as_many_questions_are_looked_at_as_will_be_asked(tokenizer, tmp_path):
    silent = {"messages": [{"role": "user", "content": "Hm."}]}
    two = talk(("human", "What is it?"), ("gpt", "A cat"), ("human", "Sure?"), ("gpt", "It is."))
    lost = talk(("human", "<image>\nWhat?"), ("gpt", "A cat"), image="nowhere.png")
    assert evaluator(settings(tmp_path, [two, lost], count=2), tokenizer)
    for count, given in ((3, [two, lost]), (1, [silent, silent, lost])):
        with pytest.raises(DataError, match=r"nowhere\.png"):
            evaluator(settings(tmp_path, given, count=count), tokenizer)


def test_a_dialogue_too_long_for_training_is_cut_where_training_cuts(tokenizer, tmp_path):
    turns = [("human", "What is it?"), ("gpt", ANSWERS[0])] * 8
    c = settings(tmp_path, [talk(*turns)], answers=False, loss=True)
    with pytest.raises(DataError, match="max_length is 96"):
        evaluator(c, tokenizer)
    c.data.on_long = "cut"
    assert evaluator(c, tokenizer)


@pytest.mark.parametrize(
    ("best", "fields"), [("loss", {}), ("blind_accuracy", {}), ("accuracy", {"answers": False, "loss": True})]
)
def test_a_best_without_its_figure_is_refused(tokenizer, tmp_path, best, fields):
    c = settings(tmp_path, list(records(1)), **fields)
    c.checkpoint.keep_best = best
    with pytest.raises(ConfigError, match="eval gives no such figure"):
        evaluator(c, tokenizer)


# --- the loss


def expected_loss(c, tokenizer, arrays, found):
    """The mean over all tokens of answers and their ends, from logits of each dialogue alone, with NumPy."""
    model, total, count = Model(c.model, arrays, tokenizer), 0.0, 0
    roles = {"human": "user", "gpt": "assistant"}
    for record in found:
        turns = [(turn["from"], turn["value"].replace("<image>\n", "")) for turn in record["conversations"]]
        messages = [{"role": roles[who], "content": text} for who, text in turns]
        images = [f"{c.eval.images}/{record['image']}"] if "image" in record else []
        logits = model.logits(Request(messages, images))[0].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        at = len(
            logits
        )  # from the end back: vector and tokens of a question; vector, tokens, end of an answer
        for who, text in reversed(turns):
            ids = [*tokenizer.encode(text), *([tokenizer.eos] if who == "gpt" else [])]
            at -= len(ids) + 1
            if who == "gpt":
                total -= sum(logp[at + k, token] for k, token in enumerate(ids))
                count += len(ids)
    return total / count


def spread(c, arrays):
    mesh = sharding.make_mesh(**vars(c.mesh))
    return jax.device_put(arrays, placements(mesh, arrays))


@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)])
def test_the_loss_is_that_of_all_answer_tokens(tokenizer, tmp_path, mesh, monkeypatch):
    """In batches of eight, the last of which is filled up; each device has its part of the rows."""
    found = list(records())
    c = settings(tmp_path, found, MeshConfig(*mesh), answers=False, loss=True)
    arrays, put = tiny.arrays(c.model), held_out_loss.put
    expected, rows = expected_loss(c, tokenizer, arrays, found), []

    def watched(batch, mesh):
        batch = put(batch, mesh)
        rows.append({shard.data.shape[0] for shard in batch.tokens.addressable_shards})
        return batch

    monkeypatch.setattr(held_out_loss, "put", watched)
    figures, shown = evaluator(c, tokenizer)(spread(c, arrays))
    assert figures == {"loss": pytest.approx(expected, rel=1e-5)} and shown == []
    assert rows == [{8 // (mesh[0] * mesh[1])}] * 2
    c.eval.count = 3
    expected = expected_loss(c, tokenizer, arrays, found[:3])
    assert evaluator(c, tokenizer)(spread(c, arrays))[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_second_evaluation_compiles_nothing_and_leaves_nothing_behind(tokenizer, tmp_path):
    c = settings(tmp_path, list(records(5)), MeshConfig(1, 2), loss=True, blind=True, batch_size=4)
    evaluate = evaluator(c, tokenizer)
    one, other = (spread(c, tiny.arrays(c.model, seed=seed)) for seed in (0, 1))
    held = lambda: gc.collect() * 0 + sum(a.nbytes for a in jax.live_arrays())
    before = held()
    first, _ = evaluate(one)
    with drive.compiled() as seen:
        second, asked = evaluate(other)
    assert seen == [] and first["loss"] != second["loss"]
    assert set(second) == {"loss", "accuracy", "questions", "blind_accuracy"} and len(asked) == 6
    assert held() - before < 0.01 * sum(a.nbytes for a in one.values())


def test_patches_are_read_by_one_program():
    """A bare encoder's accuracy, evaluated twice."""
    c = config()
    c.eval.count = 8
    evaluate = OBJECTIVES["patches"].evaluator(c, None)
    made = lambda seed: nnx.parameters(OBJECTIVES["patches"].module(c.model, rngs=nnx.Rngs(seed)))
    one, other = made(0), made(1)
    evaluate(one)
    with drive.compiled() as seen:
        figures, shown = evaluate(other)
    assert seen == [] and figures["pictures"] == 8 and shown == []
