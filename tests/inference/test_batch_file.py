"""A file of requests becomes a file of answers, line by line, whatever is wrong with a line and wherever an earlier run stopped."""

import json

import pytest

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import from_request
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.batch_file import answer_file
from omnifusion_jax.inference.model import Answer

GENERATION = GenerationConfig(max_new_tokens=5)


class Echo:
    """Answers with the last turn; what it was asked is in `asked`. A question that starts with "fail" fails, "stop" ends the process."""

    def __init__(self):
        self.asked, self.calls = [], []

    def generate(self, requests, generation, *, batch_size=16, on_error="raise"):
        assert generation is GENERATION and on_error == "record"
        self.calls.append((len(requests), batch_size))
        self.asked += requests
        return [self.answer(i, request) for i, request in enumerate(requests)]

    def answer(self, i, request):
        text = request.messages[-1]["content"] if request.messages else ""
        if text.startswith("stop"):
            raise KeyboardInterrupt
        try:
            where = from_request(request, f"request {i}").where
        except DataError as error:
            return Answer(finish_reason="error", error=str(error))
        if text.startswith("fail"):
            return Answer(finish_reason="error", error=f"{where}: no such picture")
        return Answer(text=f"ответ: {text}", tokens=[len(text), 2])


def ask(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(model, files, images="pics", batch_size=16):
    return answer_file(model, *files, files[0].parent / images, GENERATION, batch_size)


def test_answers_stand_in_order_with_their_ids(files):
    write(files[0], ask("one", id="a"), ask("два", id=7), "", ask("three", images=["x/y.jpg"]))
    model = Echo()
    assert run(model, files) == (3, 0, 0)
    assert read(files[1]) == [
        {"id": "a", "text": "ответ: one", "tokens": [3, 2], "finish_reason": "stop", "error": None},
        {"id": "7", "text": "ответ: два", "tokens": [3, 2], "finish_reason": "stop", "error": None},
        {"id": "4", "text": "ответ: three", "tokens": [5, 2], "finish_reason": "stop", "error": None},  # its line number
    ]
    assert "ответ" in files[1].read_text(encoding="utf-8")
    assert [r.images for r in model.asked] == [[], [], [files[0].parent / "pics/x/y.jpg"]]


def test_requests_go_to_the_model_in_portions(files):
    write(files[0], *(ask(f"q{i}") for i in range(11)))
    model = Echo()
    assert run(model, files, batch_size=2) == (11, 0, 0)
    assert model.calls == [(8, 2), (3, 2)]
    assert [row["text"] for row in read(files[1])] == [f"ответ: q{i}" for i in range(11)]


def test_llava_records_lose_their_mark_and_their_last_answer(files):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]
    more = [*talk, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because"}]
    write(files[0], {"id": "a", "image": "c.jpg", "conversations": talk}, {"id": "b", "image": ["c.jpg"], "conversations": more})
    model = Echo()
    run(model, files)
    assert [[(m["role"], m["content"]) for m in r.messages] for r in model.asked] == [
        [("user", "What?")],
        [("user", "What?"), ("assistant", "A cat"), ("user", "Why?")],
    ]
    assert [r.images for r in model.asked] == [[files[0].parent / "pics/c.jpg"]] * 2


def test_errors_stay_with_their_lines(files):
    talk = [{"from": "human", "value": "<image>\nWhat?"}]
    write(
        files[0],
        ask("fine", id="a"),
        '{"id": "b", "mess',
        ask("fail here", id="c"),
        {"id": "d", "text": "?"},
        ask("nobody", id="e", images=[{"url": "x"}]),
        {"id": "f", "conversations": talk},
        {"id": "g", "messages": [{"role": "robot", "content": "x"}]},
        "[1]",
        ask("fine too", id="h"),
        '{"id": "\\ud83d", "messages": []}',  # half a character
    )
    source = files[0]
    assert run(Echo(), files) == (10, 8, 0)
    rows = read(files[1])
    assert [row["id"] for row in rows] == ["a", "2", "c", "d", "e", "f", "g", "8", "h", "\ud83d"]
    assert [row["error"] is None for row in rows] == [True, *[False] * 7, True, False]
    errors = [row["error"] for row in rows]
    assert all(row["finish_reason"] == "error" and row["text"] == "" and row["tokens"] == [] for row in rows if row["error"])
    for line, words in {
        2: ":2: not JSON",
        3: ':3 (id "c"): no such picture',
        4: ":4 (id \"d\"): there is neither 'conversations' (LLaVA) nor 'messages'",
        5: ':5 (id "e"): "image" must name a file',
        6: ':6 (id "f"): the text has 1 <image> mark but "image" lists 0 files. Add the missing file',
        7: ":7: a turn is from 'robot'; known are human, user",
        8: ":8: a dialogue is an object",
    }.items():
        assert errors[line - 1].startswith(f"{source}{words}"), errors[line - 1]


def test_a_cut_output_is_continued_wherever_it_was_cut(files):
    write(files[0], *(ask(f"вопрос {i}", id=f"r{i}") for i in range(3)))
    run(Echo(), files)
    whole = files[1].read_bytes()
    for cut in range(len(whole)):  # through letters too
        files[1].write_bytes(whole[:cut])
        model = Echo()
        kept = whole[:cut].count(b"\n")
        assert run(model, files) == (3 - kept, 0, kept) and len(model.asked) == 3 - kept
        assert files[1].read_bytes() == whole


def test_a_finished_output_is_left_alone(files):
    write(files[0], ask("one"), ask("two"))
    run(Echo(), files)
    before, model = files[1].read_bytes(), Echo()
    assert run(model, files) == (0, 0, 2)
    assert files[1].read_bytes() == before and not model.asked


def test_a_run_that_dies_keeps_its_finished_portions(files):
    write(files[0], *(ask(f"q{i}") for i in range(4)), ask("stop"))
    with pytest.raises(KeyboardInterrupt):
        run(Echo(), files, batch_size=1)
    assert len(read(files[1])) == 4
    write(files[0], *(ask(f"q{i}") for i in range(5)))
    assert run(Echo(), files, batch_size=1) == (1, 0, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"id": "x", "text": "", "tokens": [], "finish_reason": "stop", "error": null}\n', "answers to other requests than"),
        ("My notes\n", "something else than answers"),
        ("My notes", "something else than answers"),
        ('{"name": 1}\n', "something else than answers"),
        ("[1]\n", "something else than answers"),
        ('{"id": "1", "messages": []}\n', "something else than answers"),
        ("\n", "something else than answers"),
    ],
)
def test_an_output_of_something_else_is_refused_and_kept(files, content, words):
    write(files[0], ask("one"))
    files[1].write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        run(Echo(), files)
    assert str(files[1]) in str(caught.value) and "give another output" in str(caught.value)
    assert files[1].read_text() == content


def test_more_answers_than_requests_are_refused(files):
    write(files[0], ask("one"), ask("two"))
    run(Echo(), files)
    write(files[0], ask("one"))
    with pytest.raises(DataError, match="more answers than there are requests"):
        run(Echo(), files)


def test_input_that_is_missing_or_is_the_output(files, tmp_path):
    with pytest.raises(DataError, match=r"in\.jsonl does not exist"):
        run(Echo(), files)
    before = write(files[0], ask("one", id="a")).read_bytes()
    with pytest.raises(DataError, match="is the file of requests: give another output"):
        run(Echo(), (files[0], files[0]))
    assert files[0].read_bytes() == before


def test_folders_are_made_and_unusual_line_separators_kept(files, tmp_path):
    write(files[0], ask("a\u2028b\x85c", id="a"), ask("d", id="e"))
    target = tmp_path / "new" / "folder" / "out.jsonl"
    assert run(Echo(), (files[0], target)) == (2, 0, 0)
    assert read(target)[0]["text"] == "ответ: a\u2028b\x85c"
    assert run(Echo(), (files[0], target)) == (0, 0, 2)
