"""What counts as a right answer, by a model that says one sentence whatever it is asked."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.layout import Layout
from omnifusion_jax.data.sources import JsonSource
from omnifusion_jax.errors import DataError
from omnifusion_jax.evaluation.exact_match import exact_match, questions
from omnifusion_jax.inference.model import Model

SENTENCE = "A red circle"


def parrot(tokenizer, then, **settings):
    """A real model without attention and feed-forward: each token calls for the next of SENTENCE, whose last
    calls for the token `then`.
    """
    c = tiny.shallow(**settings)
    arrays = tiny.arrays(c)
    for path in arrays:
        if path.endswith(("attention/out/kernel", "/down/kernel")) and path.startswith("decoder"):
            arrays[path] = np.zeros_like(arrays[path])
    said = [*tokenizer.encode(SENTENCE), then]
    assert len(set(said[:-1])) == len(said) - 1
    embed = arrays["decoder/embed"]
    arrays["decoder/norm/scale"] = np.ones_like(arrays["decoder/norm/scale"])
    arrays["decoder/head"] = np.zeros_like(arrays["decoder/head"])
    for before, token in zip([arrays["special/bot"], *embed[said[:-1]]], said, strict=True):
        arrays["decoder/head"][:, token] += before / np.linalg.norm(before)
    return Model(c, arrays, tokenizer)


def source(folder, *truths, **fields):
    records = [
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": truth}], **fields}
        for truth in truths
    ]
    (folder / "d.json").write_text(json.dumps(records))
    return JsonSource(folder / "d.json", folder)


def test_an_answer_is_right_when_it_equals_the_truth(tokenizer, tmp_path):
    """Outer spaces aside; neither what it contains nor what contains it will do."""
    model = parrot(tokenizer, tokenizer.eos)
    truths = (SENTENCE, f"  {SENTENCE}\n", "A red", "red circle", f"{SENTENCE} Yes.", SENTENCE.lower())
    figures, records = exact_match(model, source(tmp_path, *truths), max_new_tokens=16, blind=True)
    assert figures == {"accuracy": 2 / 6, "questions": 6, "blind_accuracy": 2 / 6}
    assert [r.right for r in records] == [True, True, False, False, False, False]
    assert {r.answer for r in records} == {SENTENCE} and [r.truth for r in records] == list(truths)
    figures, _ = exact_match(model, source(tmp_path, *truths), 1)
    assert figures == {"accuracy": 1.0, "questions": 1}


def test_a_layout_that_teaches_no_end_counts_as_many_tokens_as_the_truth_has(tokenizer, tmp_path):
    model = parrot(tokenizer, tokenizer.encode(SENTENCE)[1], layout="original")  # it goes round and round
    truths = ("A red", SENTENCE, "red circle", "A blue circle", "A")
    figures, records = exact_match(model, source(tmp_path, *truths), max_new_tokens=40)
    assert figures == {"accuracy": 3 / 5, "questions": 5, "cut_to_truth": 5}
    assert [r.right for r in records] == [True, True, False, False, True] and records[0].answer == "A red"


def test_a_truth_that_ends_by_itself_may_be_reached(tokenizer, tmp_path):
    """ "</s>" in the data is the token, as the published code reads it."""
    model = parrot(tokenizer, tokenizer.eos, layout="original")
    figures, _ = exact_match(model, source(tmp_path, f"{SENTENCE}</s>"), max_new_tokens=40)
    assert figures == {"accuracy": 1.0, "questions": 1, "cut_to_truth": 0}


@pytest.mark.parametrize(("layout", "asked"), [("omnifusion", "What?"), ("original", "<image>\nWhat?")])
def test_questions_are_read_as_the_layout_reads_them(tokenizer, tmp_path, layout, asked):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    turns = (("human", "<image>\nWhat?"), ("gpt", "A"), ("human", "Why?"), ("gpt", "B"))
    talk, lay = (
        Dialogue("x", turns, tiny.shown(tmp_path / "a.png"), marked=True),
        Layout(tokenizer, tiny.config(layout=layout), 256),
    )
    found = list(questions(talk, lay))
    assert [(text, truth) for _, text, truth in found] == [(asked, "A"), ("Why?", "B")]
    assert [[m["content"] for m in request.messages] for request, _, _ in found] == [
        [asked],
        [asked, "A", "Why?"],
    ]
    assert all(request.images == [tmp_path / "a.png"] for request, _, _ in found)
    if layout == "original":  # the published reading of "user"
        assert not list(questions(Dialogue("x", (("user", "What?"), ("gpt", "A")), marked=True), lay))


def test_a_picture_comes_with_the_turn_that_shows_it(tokenizer):
    """A chat template has a place for it in every turn; a question before that is asked without it."""
    lay = tiny.layout(
        tokenizer, 256, layout="template", template="{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    talk = Dialogue(
        "x",
        (("user", "Hello"), ("assistant", "Hi"), ("user", "<image>\nWhat?"), ("assistant", "A cat")),
        tiny.shown("a.png"),
    )
    first, second = (request for request, _, _ in questions(talk, lay))
    assert first.images == [] and first.messages == [{"role": "user", "content": "Hello"}]
    assert second.images == ["a.png"] and second.messages[2]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What?"},
    ]


def test_blank_pictures_are_black_and_of_the_same_size(tokenizer, tmp_path, monkeypatch):
    Image.new("RGB", (31, 17), "red").save(tmp_path / "a.png")
    (tmp_path / "d.json").write_text(
        json.dumps(
            [
                {
                    "image": "a.png",
                    "messages": [
                        {"role": "user", "content": "?"},
                        {"role": "assistant", "content": SENTENCE},
                    ],
                }
            ]
        )
    )
    model, seen = parrot(tokenizer, tokenizer.eos), []
    generate = model.generate
    monkeypatch.setattr(
        model,
        "generate",
        lambda requests, *args, **kwargs: (seen.append(requests), generate(requests, *args, **kwargs))[1],
    )
    figures, records = exact_match(
        model, JsonSource(tmp_path / "d.json", tmp_path), max_new_tokens=16, blind=True
    )
    assert (
        figures == {"accuracy": 1.0, "questions": 1, "blind_accuracy": 1.0} and records[0].blind == SENTENCE
    )
    assert seen[0][0].images == [tmp_path / "a.png"]
    assert seen[1][0].images[0].size == (31, 17) and not np.asarray(seen[1][0].images[0]).any()


def test_nothing_to_ask(tokenizer, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "?"}]}))
    with pytest.raises(DataError, match="hold no question"):
        exact_match(parrot(tokenizer, tokenizer.eos), JsonSource(tmp_path / "d.jsonl"))
