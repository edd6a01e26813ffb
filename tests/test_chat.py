"""The terminal chat: Ctrl-C stops an answer, not the program."""

import itertools
import types

import pytest
from conftest import run_command
from PIL import Image

from omnifusion_jax import chat
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.errors import DataError


class Talker:
    """Streams what it is given; an exception in the list is raised there."""

    def __init__(self, *answers):
        self.answers, self.asked = iter(answers), []

    def stream(self, request, generation):
        self.asked.append(([m["content"] for m in request.messages], list(request.images)))
        for piece in next(self.answers):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def talk(monkeypatch, talker, *lines):
    """Runs the chat with these lines typed; an exception is what typing raises."""
    typed = itertools.chain(lines, [EOFError()])

    def read(prompt):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    chat.converse(talker, [], GenerationConfig())


def test_turns_are_remembered_and_ctrl_c_stops_only_the_answer(monkeypatch, capsys):
    talker = Talker(["a ", "cat"], ["it ", "is ", KeyboardInterrupt(), "never"], ["yes"])
    talk(monkeypatch, talker, "what?", KeyboardInterrupt(), "which?", "sure?")
    assert talker.asked[1][0] == ["what?", "a cat", "which?"]
    assert talker.asked[2][0] == ["what?", "a cat", "which?", "it is ", "sure?"]
    out = capsys.readouterr().out
    assert "a cat" in out and "it is  [stopped]" in out and "never" not in out


def draw(path, colour):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def colours(pictures):
    return [picture.getpixel((0, 0)) for picture in pictures]


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_commands(monkeypatch, tmp_path):
    talker = Talker(["one"], ["two"], ["three"])
    talk(
        monkeypatch,
        talker,
        f"/image {draw(tmp_path / 'a.png', RED)}",
        "first",
        "/new",
        "",
        "second",
        "/image",
        "third",
        "/quit",
        "unheard",
    )
    assert [(texts, colours(images)) for texts, images in talker.asked] == [
        (["first"], [RED]),
        (["second"], [RED]),
        (["third"], []),
    ]


@pytest.mark.parametrize("typed", ["'{}'", '"{}"', "  {}  ", "~/my pictures/b c.png"])
def test_a_file_is_found_as_people_type_it(monkeypatch, tmp_path, typed):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = draw(tmp_path / "my pictures" / "b c.png", BLUE)
    talker = Talker(["one"])
    talk(monkeypatch, talker, f"/image {typed.format(file)}", "first")
    assert colours(talker.asked[0][1]) == [BLUE]


def test_a_picture_that_cannot_be_opened_changes_nothing(monkeypatch, capsys, tmp_path):
    talker = Talker(["one"], ["two"])
    talk(
        monkeypatch,
        talker,
        f"/image {draw(tmp_path / 'a.png', RED)}",
        "first",
        f"/image {tmp_path}/nowhere.png",
        "second",
    )
    texts, images = talker.asked[1]
    assert texts == ["first", "one", "second"] and colours(images) == [RED]
    assert f"error: {tmp_path}/nowhere.png" in capsys.readouterr().out


def test_a_command_that_is_none_is_not_said_to_the_model(monkeypatch, capsys):
    talker = Talker(["fine"])
    talk(monkeypatch, talker, "/imagine a cat", "hello")
    assert [texts for texts, _ in talker.asked] == [["hello"]]
    assert "there is no /imagine. /image FILE shows" in capsys.readouterr().out


def test_a_turn_that_fails_is_taken_back(monkeypatch, capsys):
    talker = Talker([DataError("request: too long")], ["fine"])
    talk(monkeypatch, talker, "what?", "and now?")
    assert "error: request: too long" in capsys.readouterr().out
    assert talker.asked[1] == (["and now?"], [])


def test_a_wrong_picture_stops_before_the_model_is_loaded(tmp_path):
    said = run_command("chat", f"--image={tmp_path}/nowhere.png", "--model=/nowhere", fails=True)
    assert said.count("\n") == 1 and said.startswith("error: ") and f"{tmp_path}/nowhere.png" in said


@pytest.mark.parametrize("pieces", [[], [" ", "\n"], [KeyboardInterrupt()]])
def test_an_answer_without_words_leaves_no_trace(monkeypatch, pieces):
    talker = Talker(pieces, ["yes"])
    talk(monkeypatch, talker, "what?", "again?")
    assert talker.asked[1][0] == ["again?"]


def test_beams_are_known_only_when_all_is_said():
    talker = Talker()
    talker.generate = lambda requests, generation: [
        types.SimpleNamespace(text=f"{len(requests)} with {generation.num_beams}")
    ]
    assert chat.answer(talker, None, GenerationConfig(num_beams=3)) == "1 with 3"


def test_ctrl_c_stops_beams_too(capsys):
    def generate(requests, generation):
        raise KeyboardInterrupt

    talker = Talker()
    talker.generate = generate
    assert chat.answer(talker, None, GenerationConfig(num_beams=3)) == ""
    assert "[stopped]" in capsys.readouterr().out
