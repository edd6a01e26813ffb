"""A file of requests becomes a file of answers, line by line.

That is so whatever is wrong with a line, and wherever an earlier run stopped.
"""

import dataclasses
import json
import os

import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.engine import Engine
from omnifusion_jax.inference.model import Model
from omnifusion_jax.jobs.answer_file import answer_file
from omnifusion_jax.jobs.output import Output

GREEDY = GenerationConfig(max_new_tokens=5)
SAMPLED = GenerationConfig(max_new_tokens=8, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Model(tiny.shallow(), tiny.arrays(tiny.shallow()), tokenizer, name="tiny")


@pytest.fixture(scope="module")
def original(tokenizer):
    """The same parameters; only dialogues are read otherwise."""
    return Model(tiny.shallow(layout="original"), tiny.arrays(tiny.shallow()), tokenizer, name="tiny")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "pics").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "pics" / "c.png")
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def ask(text, **fields):
    return {"messages": [{"role": "user", "content": text}], **fields}


def write(path, *records):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records),
        encoding="utf-8",
    )
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def run(model, files, generation=GREEDY, batch_size=2, images="pics", **options):
    """(answers, errors, kept, retried)"""
    return answer_file(model, *files, files[0].parent / images, generation, batch_size, **options)[:4]


def alone(model, name, *messages, images=(), generation=GREEDY):
    """The line that answers one request, asked in Python."""
    [a] = model.generate([Request(list(messages), list(images), name)], generation)
    return {"id": name, "text": a.text, "tokens": a.tokens, "finish_reason": a.finish_reason, "error": None}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def watch(monkeypatch, model, before):
    """Calls `before(answered)` when the model has an answer; so many have gone before it."""
    each = model.each

    def watched(*args, **kwargs):
        for answered, found in enumerate(each(*args, **kwargs)):
            before(answered)
            yield found

    monkeypatch.setattr(model, "each", watched)


def stop():
    raise KeyboardInterrupt


def header(files):
    return files[1].with_name("out.jsonl.header.json")


# --- what is written


def test_a_file_may_begin_with_a_byte_order_mark(model, files):
    files[0].write_text(json.dumps({"id": "a", **ask("What?")}) + "\n", encoding="utf-8-sig")
    run(model, files)
    assert read(files[1]) == [alone(model, "a", user("What?"))]


def test_answers_stand_in_order_with_their_ids(model, files):
    write(
        files[0],
        ask("What is it?", id="a"),
        ask("два", id=7),
        "",
        ask("three circles", images=["c.png"]),
        ask("no", id=0),
        ask("", id=""),
    )
    assert run(model, files) == (5, 1, 0, 0)
    picture = files[0].parent / "pics/c.png"
    *rows, empty = read(files[1])
    assert rows == [
        alone(model, "a", user("What is it?")),
        alone(model, "7", user("два")),
        alone(model, "4", user("three circles"), images=[picture]),  # its line number
        alone(model, "0", user("no")),
    ]
    assert (
        empty["id"] == ""
        and empty["error"].startswith(f"{files[0]}:6 ")
        and len({str(row["tokens"]) for row in rows}) > 1
    )


def test_the_line_number_is_found_behind_any_path(model, tmp_path):
    source = write(tmp_path / "a:b.jsonl", ask("What?"), ask("Why?"))
    run(model, (source, tmp_path / "out.jsonl"))
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == ["1", "2"]


def test_letters_stay_readable(model, files):
    write(files[0], ask("?", id="жук"))
    run(model, files)
    assert '"id": "жук"' in files[1].read_text(encoding="utf-8")


def test_answers_are_written_as_they_come(model, files, monkeypatch):
    write(files[0], *[ask("What is it?")] * 11)
    seen = []
    watch(monkeypatch, model, lambda answered: seen.append(files[1].read_bytes().count(b"\n")))
    run(model, files, batch_size=2)
    assert seen == list(range(11))
    assert [row["id"] for row in read(files[1])] == [str(i) for i in range(1, 12)]


def test_requests_of_like_length_follow_one_another_and_answers_find_their_places(model, files, monkeypatch):
    """In the order of the input, and as they are done."""
    texts = ["two circles " * (1 + i % 3) for i in range(11)]
    write(files[0], *(ask(text, id=f"r{i}") for i, text in enumerate(texts)))
    expected = [alone(model, f"r{i}", user(text)) for i, text in enumerate(texts)]
    asked, put = [], Engine.put

    def watched(engine, question, *args):
        asked.append(len(question.sample.tokens))
        return put(engine, question, *args)

    monkeypatch.setattr(Engine, "put", watched)
    run(model, files, batch_size=2)
    assert read(files[1]) == expected
    assert asked == sorted(asked, reverse=True) and len(set(asked)) == 3
    files[1].unlink()
    run(model, files, batch_size=2, order="done")
    rows = read(files[1])
    assert sorted(rows, key=lambda row: row["place"]) == [a | {"place": i} for i, a in enumerate(expected)]


TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]
LONGER = [*TALK, {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because"}]


@pytest.mark.parametrize("layout", ["omnifusion", "original"])
def test_llava_records_are_asked_as_they_are_taught(request, layout, files):
    """Their last answer is the model's to give; the mark is text in the published layout alone."""
    model = request.getfixturevalue("model" if layout == "omnifusion" else "original")
    write(
        files[0],
        {"id": "a", "image": "c.png", "conversations": TALK},
        {"id": "b", "image": ["c.png"], "conversations": LONGER},
    )
    assert run(model, files) == (2, 0, 0, 0)
    first, picture = (
        user("What?" if layout == "omnifusion" else "<image>\nWhat?"),
        files[0].parent / "pics/c.png",
    )
    found = read(files[1])
    assert found[0] == alone(model, "a", first, images=[picture])
    assert found[1] == alone(model, "b", first, assistant("A cat"), user("Why?"), images=[picture])
    if layout == "original":
        assert found[0]["tokens"] != alone(model, "a", user("What?"), images=[picture])["tokens"]


def test_errors_stay_with_their_lines(model, files):
    talk = [{"from": "human", "value": "<image>\nWhat?"}]
    write(
        files[0],
        ask("fine", id="a"),
        '{"id": "b", "mess',
        ask("What?", id="c", images=["nowhere.png"]),
        {"id": "d", "text": "?"},
        ask("nobody", id="e", images=[{"url": "x"}]),
        {"id": "f", "conversations": talk},
        {"id": "g", "messages": [{"role": "robot", "content": "x"}]},
        "[1]",
        ask("fine too", id="h"),
        '{"id": "\\ud83d", "messages": []}',  # half a character
        ask([{"type": "video"}], id="j"),
        {
            "id": "k",
            "messages": [*ask("What?")["messages"], {"role": "assistant", "content": "A cat"}],
        },  # no LLaVA record: nothing is left out
    )
    source = files[0]
    assert run(model, files) == (12, 10, 0, 0)
    rows = read(files[1])
    assert [row["id"] for row in rows] == ["a", "2", "c", "d", "e", "f", "g", "8", "h", "\ud83d", "j", "k"]
    assert [row["error"] is None for row in rows] == [True, *[False] * 7, True, *[False] * 3]
    errors = [row["error"] for row in rows]
    assert all(
        row["finish_reason"] == "error" and row["text"] == "" and row["tokens"] == []
        for row in rows
        if row["error"]
    )
    for line, words in {
        2: ":2: not JSON",
        3: f':3 (id "c"): {files[0].parent}/pics/nowhere.png: there is no such file',
        4: ":4 (id \"d\"): there is neither 'conversations' (LLaVA) nor 'messages'",
        5: ':5 (id "e"): "image" must name a file',
        6: ':6 (id "f"): the text has 1 <image> mark but "image" lists 0 files. Add the missing file',
        7: ":7 (id \"g\"): turn 0 is from 'robot'; known are human, user",
        8: ":8: a dialogue is an object",
        11: ":11 (id \"j\"): messages[0].content[0] is of type 'video'; known are text",
        12: ':12 (id "k"): the last turn is the assistant\'s. End with a question',
    }.items():
        assert errors[line - 1].startswith(f"{source}{words}"), errors[line - 1]


# --- random draws


QUESTIONS = ("What is it?", "How many circles?", "Left", "Сколько?", "A red square", "Where?")


def test_a_draw_follows_from_the_seed_and_the_id_alone(model, files):
    """The same answer alone, in any order, with other neighbours, in batches of another size, and after a cut
    anywhere.
    """
    records = [ask(text, id=f"r{i}") for i, text in enumerate(QUESTIONS)]
    expected = {
        f"r{i}": alone(model, f"r{i}", user(text), generation=SAMPLED) for i, text in enumerate(QUESTIONS)
    }
    for batch_size, order in ((2, range(6)), (2, (3, 5, 0, 4, 2, 1)), (1, (5, 1))):
        files[1].unlink(missing_ok=True)
        write(files[0], *(records[i] for i in order))
        run(model, files, SAMPLED, batch_size)
        assert read(files[1]) == [expected[f"r{i}"] for i in order]
    write(files[0], *records)
    files[1].unlink()
    run(model, files, SAMPLED)
    whole = files[1].read_bytes()
    for cut in [*range(0, len(whole), 41), *(i + 1 for i, byte in enumerate(whole) if byte == 10)]:
        files[1].write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert run(model, files, SAMPLED, 1 + cut % 2) == (6, 0, kept, 0)
        assert files[1].read_bytes() == whole


def test_a_line_without_an_id_draws_by_its_number(model, files):
    """One question in three portions: none begins its random numbers anew."""
    write(files[0], *[ask("What is it?")] * 17)
    run(model, files, SAMPLED, batch_size=2)  # portions of 8
    rows = [row["tokens"] for row in read(files[1])]
    assert len({str(row) for row in rows}) == 17
    assert read(files[1])[8] == alone(model, "9", user("What is it?"), generation=SAMPLED)


def test_names_and_seeds_give_other_draws(model):
    def tokens(seed=3, **fields):
        return model.generate(
            [Request([user("What is it?")], **fields)], dataclasses.replace(SAMPLED, seed=seed)
        )[0].tokens

    assert tokens(id="a") == tokens(id="a")
    assert (
        len(
            {
                str(t)
                for t in (tokens(id="a"), tokens(id="b"), tokens(id="0"), tokens(), tokens(id="a", seed=4))
            }
        )
        == 5
    )
    stream = "".join(model.stream(Request([user("What is it?")], id="a"), SAMPLED))
    assert stream == alone(model, "a", user("What is it?"), generation=SAMPLED)["text"]


# --- going on


def test_a_finished_output_is_left_alone(model, files, monkeypatch):
    write(files[0], ask("one"), ask("two"))
    run(model, files)
    before = files[1].read_bytes()
    watch(monkeypatch, model, lambda answered: stop())
    assert run(model, files) == (2, 0, 2, 0)
    assert files[1].read_bytes() == before


def test_a_run_that_dies_keeps_its_finished_portions(model, files, monkeypatch):
    write(files[0], *(ask(f"q{i}") for i in range(5)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watch(patch, model, lambda answered: answered == 4 and stop())
        run(model, files, batch_size=1)
    assert len(read(files[1])) == 4
    assert run(model, files, batch_size=1) == (5, 0, 4, 0)


def test_input_may_grow(model, files):
    write(files[0], ask("one"))
    run(model, files)
    write(files[0], ask("one"), ask("two"))
    assert run(model, files) == (2, 0, 1, 0)


def test_a_line_that_was_corrected_may_have_an_id_of_its_own(model, files):
    """Its error stood under the number of the line, since nothing else could be read."""
    write(files[0], ask("one", id="a"), "not JSON", ask("two", id="b"))
    assert run(model, files) == (3, 1, 0, 0)
    assert [row["id"] for row in read(files[1])] == ["a", "2", "b"]
    write(files[0], ask("one", id="a"), ask("corrected", id="c"), ask("two", id="b"))
    assert run(model, files, retry_errors=True) == (3, 0, 3, 1)
    assert read(files[1])[1] == alone(model, "c", user("corrected"))


def test_errors_of_other_requests_are_not_gone_on_with(model, files):
    """All of them failed, but they had ids: the file is not that of the new requests."""
    write(files[0], *(ask("What?", id=name, images=["nowhere.png"]) for name in "xy"))
    assert run(model, files) == (2, 2, 0, 0)
    write(files[0], *(ask("one", id=name) for name in "pq"))
    for retry in (False, True):
        with pytest.raises(DataError, match="answers to other requests than"):
            run(model, files, retry_errors=retry)


def test_an_answer_under_a_number_is_not_that_of_a_request_with_an_id(model, files, monkeypatch):
    """Only an error may be, see above."""
    write(files[0], ask("one"))
    with monkeypatch.context() as patch:
        patch.setattr(Output, "save", lambda self: None)  # killed before its header tells of the answer
        run(model, files)
    write(files[0], ask("one", id="a"))
    with pytest.raises(DataError, match="answers to other requests than"):
        run(model, files)


def test_a_request_may_not_change_once_it_is_answered_but_an_error_may(model, files):
    write(files[0], ask("one", id="a"), "not JSON", ask("two", id="b"))
    assert run(model, files) == (3, 1, 0, 0)
    whole = files[1].read_bytes()
    write(files[0], ask("one", id="a"), ask("corrected", id="2"), ask("two", id="b"))
    assert run(model, files, retry_errors=True) == (3, 0, 3, 1)
    assert read(files[1])[1] == alone(model, "2", user("corrected"))
    write(files[0], ask("one", id="a"), ask("corrected again", id="2"), ask("two", id="b"))
    with pytest.raises(DataError, match="one of the first 3 requests was changed after it was answered"):
        run(model, files)
    write(files[0], ask("one", id="a"), ask("corrected", id="2"), ask("two", id="b"))
    files[1].write_bytes(
        files[1].read_bytes()[: whole.index(b"\n") + 9]
    )  # fewer answers than the header knows of
    assert run(model, files) == (3, 0, 1, 0)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_errors_are_tried_again_on_demand(model, files, batch_size):
    late = [ask("What?", id=f"late{i}", images=[f"late{i}.png"]) for i in range(6)]
    write(files[0], late[0], ask("one", id="a"), *late[1:], ask("two", id="b"), "not JSON")
    assert run(model, files) == (9, 7, 0, 0)
    before = files[1].read_bytes().split(b"\n")
    assert run(model, files) == (9, 7, 9, 0)  # not by themselves, but counted
    for i in range(5):
        Image.new("RGB", (8, 8)).save(files[0].parent / "pics" / f"late{i}.png")
    assert run(model, files, batch_size=batch_size, retry_errors=True) == (9, 2, 9, 7)
    after = files[1].read_bytes().split(b"\n")
    assert [a == b for a, b in zip(before, after, strict=True)] == [
        False,
        True,
        *[False] * 4,
        True,
        True,
        True,
        True,
    ]
    assert read(files[1])[0] == alone(
        model, "late0", user("What?"), images=[files[0].parent / "pics/late0.png"]
    )


def test_a_second_try_that_dies_loses_nothing(model, files, monkeypatch):
    write(
        files[0],
        *(ask("What?", id=f"late{i}", images=[f"late{i}.png"]) for i in range(5)),
        ask("one", id="a"),
    )
    run(model, files)
    for i in range(5):
        Image.new("RGB", (8, 8)).save(files[0].parent / "pics" / f"late{i}.png")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watch(patch, model, lambda answered: answered == 4 and stop())
        run(model, files, batch_size=1, retry_errors=True)
    assert [row["error"] is None for row in read(files[1])] == [True] * 4 + [False, True]
    assert run(model, files, retry_errors=True) == (6, 0, 6, 1)


# --- what made the answers


def test_other_settings_are_refused_with_what_differs(model, files):
    write(files[0], ask("one"))
    run(model, files)
    before = files[1].read_bytes()
    other = dataclasses.replace(GREEDY, seed=7, max_new_tokens=6)
    with pytest.raises(DataError) as caught:
        run(model, files, other)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{files[1]} was made by another model or with other settings:"
    assert sorted(lines[1:-1]) == ["  generation.max_new_tokens: 5 -> 6", "  generation.seed: 0 -> 7"]
    assert (
        lines[-1] == "Run with the settings in out.jsonl.header.json, give another output, or remove this one"
    )
    with pytest.raises(DataError, match=r'images: ".*pics" -> ".*elsewhere"'):
        run(model, files, images="elsewhere")
    assert files[1].read_bytes() == before


@pytest.mark.parametrize("changed", ["weights", "dtype", "config", "tokenizer"])
def test_another_model_is_refused(model, files, tmp_path, changed):
    write(files[0], ask("one"))
    run(model, files)
    arrays, c, words, dtype = tiny.arrays(tiny.shallow()), tiny.shallow(), model.tokenizer, "float32"
    if changed == "weights":
        arrays["decoder/norm/scale"][5] += 1e-6
    elif changed == "config":
        c.prompt = "You see a picture.\n"
    elif changed == "dtype":
        dtype = "bfloat16"
    else:
        words = tiny.make_tokenizer(tmp_path / "other")
        settings = words.directory / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace('"bos_token": "<s>"', '"bos_token": "</s>"'))
        words = type(words)(words.directory)
    with pytest.raises(DataError, match="made by another model") as caught:
        run(Model(c, arrays, words, dtype, name="other"), files)
    named = [line.split(":")[0].strip() for line in str(caught.value).split("\n")[1:-1]]
    assert named == {"config": ["model", "config.prompt"], "dtype": ["model", "weights", "dtype"]}.get(
        changed, ["model", changed]
    )
    assert '  model: "tiny" -> "other"' in str(caught.value)


def test_the_same_model_under_another_name_goes_on(model, files):
    write(files[0], ask("one"), ask("two"))
    run(model, files)
    files[1].write_bytes(files[1].read_bytes().split(b"\n")[0] + b"\n")
    moved = Model(tiny.shallow(), tiny.arrays(tiny.shallow()), model.tokenizer, name="moved")
    assert run(moved, files) == (2, 0, 1, 0)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_answers_without_a_header_are_refused(model, files, content):
    write(files[0], ask("one"), ask("two"))
    run(model, files)
    header(files).unlink() if content is None else header(files).write_text(content)
    before = files[1].read_bytes()[:-9]
    files[1].write_bytes(before)
    with pytest.raises(DataError, match="missing" if content is None else "damaged") as caught:
        run(model, files)
    assert "Put it back if you have it; else give another output, or remove this one" in str(caught.value)
    assert files[1].read_bytes() == before


def test_an_output_without_answers_begins_anew(model, files):
    write(files[0], ask("one"))
    header(files).write_text('{"generation": {"seed": 9}, "requests": {}}')
    files[1].write_text('{"id": "1", "te')
    assert run(model, files) == (1, 0, 0, 0)
    made = json.loads(header(files).read_text())
    assert (
        made["generation"]["seed"] == 0
        and made["model"] == "tiny"
        and made["dtype"] == "float32"
        and made["config"]["layout"] == "omnifusion"
    )
    assert sorted(os.listdir(files[0].parent)) == ["in.jsonl", "out.jsonl", "out.jsonl.header.json", "pics"]


# --- outputs and inputs of something else


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            '{"id": "x", "text": "", "tokens": [], "finish_reason": "stop", "error": null}\n',
            "answers to other requests than",
        ),
        ("My notes\n", "something else than answers"),
        ("My notes", "something else than answers"),
        ('{"name": 1}\n', "something else than answers"),
        ("[1]\n", "something else than answers"),
        ('{"id": "1", "messages": []}\n', "something else than answers"),
        ("\n", "something else than answers"),
    ],
)
def test_an_output_of_something_else_is_refused_and_kept(model, files, content, words):
    write(files[0], ask("one"))
    files[1].write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        run(model, files)
    assert str(files[1]) in str(caught.value) and "give another output" in str(caught.value)
    assert files[1].read_text() == content and not header(files).exists()


def test_more_answers_than_requests_are_refused(model, files):
    write(files[0], ask("one"), ask("two"))
    run(model, files)
    write(files[0], ask("one"))
    with pytest.raises(DataError, match="more answers than there are requests"):
        run(model, files)


def test_input_that_is_missing_or_is_the_output(model, files):
    with pytest.raises(DataError, match=r"in\.jsonl does not exist"):
        run(model, files)
    before = write(files[0], ask("one", id="a")).read_bytes()
    with pytest.raises(DataError, match="is the file of requests: give another output"):
        run(model, (files[0], files[0]))
    assert files[0].read_bytes() == before
    with pytest.raises(DataError, match="pics is a folder: give a file as output"):
        run(model, (files[0], files[0].parent / "pics"))


def test_parquet_is_no_output(model, files):
    write(files[0], ask("one"))
    table = files[1].with_suffix(".parquet")
    with pytest.raises(DataError, match=r"answers are lines of JSON.*Give out\.jsonl as output"):
        run(model, (files[0], table))
    assert not table.exists()


def test_folders_are_made_and_unusual_line_separators_kept(model, files, tmp_path):
    write(files[0], ask("a\u2028b\x85c", id="a"), ask("d", id="e"))
    target = tmp_path / "new" / "folder" / "out.jsonl"
    assert run(model, (files[0], target)) == (2, 0, 0, 0)
    assert read(target)[0] == alone(model, "a", user("a\u2028b\x85c"))
    assert run(model, (files[0], target)) == (2, 0, 2, 0)
