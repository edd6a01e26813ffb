"""Feedback of a judge: claims, verdicts, pairs of like length; a collection goes on where it was cut."""

import contextlib
import http.server
import json
import threading

import numpy as np
import pytest
from conftest import run_command
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import omnifusion_jax as of
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.feedback import judges
from omnifusion_jax.feedback.claims import Claim, by_model, sentences
from omnifusion_jax.feedback.collect import Collection, read_questions
from omnifusion_jax.feedback.judges import Own, Remote, verdict
from omnifusion_jax.feedback.pairs import Pair, Rated, balanced, candidates


def test_sentences_are_claims_in_a_question():
    split = sentences("Is it so? {claim}")
    assert split("A cat. It is red!\n\n...\nTwo dogs; one ring") == [
        Claim(text, f"Is it so? {text}") for text in ("A cat.", "It is red!", "Two dogs;", "one ring")
    ]
    assert [claim.text for claim in split("一只猫。它是红色的！")] == ["一只猫。", "它是红色的！"]
    assert split(" \n ... ") == []


def test_claims_of_a_model_are_the_lines_that_are_as_asked_for():
    asked = []
    said = "Sure:\n- a cat | Is there a cat?\n* a red ring | Is the ring red? \n| What?\nno claim here\na|b|c"
    split = by_model(lambda text: asked.append(text) or said)
    assert split("A cat {answer}") == [
        Claim("a cat", "Is there a cat?"),
        Claim("a red ring", "Is the ring red?"),
    ]
    assert asked[0].endswith("Text: A cat {answer}") and "FACT | QUESTION" in asked[0]


def test_candidates_have_fewer_refused_claims():
    answers = [Rated("a", 0), Rated("b", 2), Rated("c", 2), Rated("a", 0), Rated("d", 1)]
    expected = {("a", "b"), ("a", "c"), ("a", "d"), ("d", "b"), ("d", "c")}
    assert set(candidates(answers)) == expected and len(candidates(answers)) == 5


TEXTS = st.integers(1, 9).map(lambda n: "w " * n)
QUESTIONS = st.lists(st.lists(st.builds(Pair, TEXTS, TEXTS), max_size=6), max_size=12)


@settings(max_examples=200, deadline=None)
@given(QUESTIONS, st.integers(1, 3))
def test_lengths_of_pairs_are_balanced(questions, most):
    taken = list(balanced(questions, most))
    assert len(taken) == len(questions)
    for some, pairs in zip(taken, questions, strict=True):
        assert len(some) <= most and all(pairs.count(pair) >= some.count(pair) for pair in some)
    # the sum never runs away: no further from zero than one pair can bring it
    assert abs(sum(pair.longer for some in taken for pair in some)) <= 8


def test_pairs_by_hand():
    long, short, even = Pair("a b c", "d"), Pair("a", "b c d"), Pair("a b", "c d")
    assert list(balanced([[long], [long, short]], 1)) == [[long], [short]]
    assert list(balanced([[long, even]], 2)) == [[even, long]]
    assert list(balanced([[long], [long]], 1)) == [[long], []]  # a second one would add to the first


@pytest.mark.parametrize(
    ("text", "expected"), [("Yes.", 1.0), (' "no", it', 0.0), ("Maybe", 0.5), ("", 0.5), ("yesterday", 0.5)]
)
def test_verdicts(text, expected):
    assert verdict(text) == expected


@pytest.fixture(scope="module")
def model():
    return of.load("omnifusion-tiny", dtype="float32")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    records = []
    for i, colour in enumerate([(225, 45, 45), (55, 95, 235)]):
        pixels = np.full((96, 96, 3), (30, 35, 45), np.uint8)
        pixels[34:62, 34:62] = colour
        Image.fromarray(pixels).save(folder / f"{i}.png")
        records.append({"id": f"q{i}", "images": [f"{i}.png"], "question": "What is at the centre?"})
    (folder / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def test_the_own_judge_says_how_likely_yes_is(model, place):
    judge = Own(model)
    # Yes and No begin with one token, which says nothing
    assert judge.ids == [model.tokenizer.encode(word) for word in ("yes", "no")]
    questions = ["Is there a red square?", "Is there a blue square?"]
    likely = [judge.yes([place / f"{i}.png"], questions) for i in range(2)]
    assert all(0 <= one <= 1 for row in likely for one in row)
    assert likely[0][0] > 0.5 > likely[0][1] and likely[1][0] < 0.5 < likely[1][1]
    assert isinstance(judge.ask("Is there a red square?"), str)


def test_the_chances_of_all_spellings_add_up(model, place):
    judge, text = Own(model), "Is there a red square?"
    judge.ids = [[5, 9, 11], [3, 7]]  # as where every spelling begins with a token of its own
    logits = model.logits(of.Request([{"role": "user", "content": text}], [place / "0.png"]))[0]
    chances = np.exp(logits[-1].astype(np.float64))
    yes, no = chances[[5, 9, 11]].sum(), chances[[3, 7]].sum()
    assert judge.yes([place / "0.png"], [text]) == [pytest.approx(yes / (yes + no), rel=1e-5)]


@contextlib.contextmanager
def server(answers):
    """An OpenAI-compatible server that gives (status, text) one after the other; yields (url, requests)."""
    got, rest = [], iter(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append((self.path, self.headers.get("Authorization"), body))
            status, text = next(rest)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.server_port}/v1/", got
        finally:
            found.shutdown()
            thread.join()


def test_a_judge_behind_an_address(place, monkeypatch):
    monkeypatch.setattr(judges, "PATIENCE", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    with server([(200, "Yes."), (429, ""), (503, ""), (200, "No, it is blue"), (200, "a | b")]) as (url, got):
        judge = Remote(url, "judge-7b")
        assert judge.yes([place / "0.png"], ["Red?", "Blue?"]) == [1.0, 0.0]
        assert judge.ask("Split.") == "a | b" and judge.name == {"url": url, "model": "judge-7b"}
    path, key, body = got[0]
    picture, text = body["messages"][0]["content"]
    assert (path, key, body["model"]) == ("/v1/chat/completions", "Bearer key", "judge-7b")
    assert picture["image_url"]["url"].startswith("data:image/png;base64,") and text["text"] == "Red?"
    assert len(got) == 5 and body["temperature"] == 0


def test_an_address_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(judges, "PATIENCE", 0.0)
    with server([(401, "")] + [(500, "")] * 4) as (url, got):
        with pytest.raises(DataError, match=r"/v1/chat/completions: 401 .*See to the address"):
            Remote(url, "m").ask("a")
        assert len(got) == 1  # not sent again: it would be refused again
        with pytest.raises(DataError, match="500"):
            Remote(url, "m").ask("a")
        assert len(got) == 5
    with pytest.raises(DataError, match="refused"):
        Remote(url, "m").ask("a")


class Cut(Exception):
    pass


def test_a_collection_goes_on_where_it_was_cut(model, place, tmp_path):
    generation = GenerationConfig(max_new_tokens=12, temperature=3.0)
    split, judge = sentences("Is there a {claim}?"), Own(model)
    begun = lambda folder: Collection(
        place / "questions.jsonl", place, tmp_path / folder, {"judge": judge.name}
    )

    def whole(folder):
        found = begun(folder)
        found.answer(model, 4, generation)
        found.judge(judge, split)
        return found.pair(2)

    count = whole("whole")
    files = ("answers.jsonl", "verdicts.jsonl", "pairs.jsonl")
    expected = {name: (tmp_path / "whole" / name).read_text() for name in files}
    answers = [json.loads(line)["answers"] for line in expected["answers.jsonl"].splitlines()]
    assert [len(one) for one in answers] == [4, 4] and len(set(answers[0])) > 1
    assert len(expected["verdicts.jsonl"].splitlines()) == 2

    cut = begun("cut")
    for question, put in cut.missing("answers.jsonl"):
        put({**question, "answers": answers[0]})
        break
    with open(tmp_path / "cut/answers.jsonl", "a") as out:
        out.write('{"id": "q1", "ans')  # cut off within a line
    assert whole("cut") == count
    assert {name: (tmp_path / "cut" / name).read_text() for name in files} == expected
    with pytest.raises(ConfigError, match="was made otherwise: judge"):
        Collection(place / "questions.jsonl", place, tmp_path / "cut", {"judge": "another"})
    if count:
        source = open_source(str(tmp_path / "whole/pairs.jsonl"), str(place), 6)
        assert len(source) == count and source[0].rejected is not None


def test_pairs_are_those_of_the_verdicts(place, tmp_path):
    found = Collection(place / "questions.jsonl", place, tmp_path / "made", {})
    answers = ["a red square", "a ring", "a cross", "nobody knows"]
    lines = [
        {"id": f"q{i}", "images": [f"{i}.png"], "question": "What?", "answers": answers} for i in range(2)
    ]
    undecided = ["e", "E?", 0.5]  # which nobody refused
    claims = [[["a", "A?", 0.9], undecided], [["b", "B?", 0.1], ["c", "C?", 0.2]], [["d", "D?", 0.4]], []]
    write = lambda name, lines: (tmp_path / "made" / name).write_text(
        "".join(json.dumps(x) + "\n" for x in lines)
    )
    write("answers.jsonl", lines)
    write("verdicts.jsonl", [{"id": f"q{i}", "claims": claims} for i in range(2)])
    assert found.pair(1) == 2
    records = [json.loads(line) for line in (tmp_path / "made/pairs.jsonl").read_text().splitlines()]
    assert records[0] == {
        "id": "q0/0",
        "images": ["0.png"],
        "question": "What?",
        "chosen": "a cross",
        "rejected": "a ring",
    }
    found.pair(9)
    written = (tmp_path / "made/pairs.jsonl").read_text()
    assert "nobody knows" not in written
    assert '"chosen": "a red square", "rejected": "a cross"' in written


def test_the_command_says_what_made_a_collection(place, tmp_path):
    """Who answers, splits and judges, and how answers are drawn: with anything else it does not go on."""
    (tmp_path / "q.jsonl").write_text('{"question": "What is at the centre?", "images": ["0.png"]}\n')
    who = ("--model=omnifusion-tiny", "--judge=omnifusion-tiny", "--claim=Is there a {claim}?")
    where = (f"--input={tmp_path}/q.jsonl", f"--images={place}", f"--output={tmp_path}/made")
    drawn = ("--answers=2", "--generation.temperature=3", "--generation.max_new_tokens=4")
    assert "pairs of 1 questions" in run_command("collect_feedback", *who, *where, *drawn)
    for wrong, says in (
        ("--generation.temperature=0", "set --generation.temperature above 0"),
        ("--claim=Is it so?", "--claim has no {claim}"),
        ("--judge=http://127.0.0.1:9/v1", "give http://127.0.0.1:9/v1#MODEL"),
    ):
        assert says in run_command("collect_feedback", *who, *where, *drawn, wrong, fails=True)
    made = json.loads((tmp_path / "made/feedback.json").read_text())
    assert made["generation"]["temperature"] == 3 and made["generation"]["max_new_tokens"] == 4
    assert (
        made["answers"] == 2 and made["splitter"] == "Is there a {claim}?" and made["model"] == made["judge"]
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": 3}', r'q.jsonl:1 is not {"id", "images"'),
        ('{"images": ["a"]}', "q.jsonl:1 is not"),
        ('{"question": "a", "images": [1]}', "q.jsonl:1 is not"),
        ("{", "q.jsonl:1: not JSON"),
        (
            '{"id": 1, "question": "a"}\n{"id": "1", "question": "b"}',
            "q.jsonl:2: a second question with the id '1'",
        ),
    ],
)
def test_questions_that_cannot_be_read_are_named(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text + "\n")
    with pytest.raises(DataError, match=message):
        list(read_questions(tmp_path / "q.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        list(read_questions(tmp_path / "none.jsonl"))
