"""The terminal chat: Ctrl-C stops an answer, not the program."""

import itertools
import types

import pytest

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


def test_commands(monkeypatch, capsys):
    talker = Talker(["one"], ["two"])
    talk(monkeypatch, talker, "/image a.png", "first", "/new", "", "second", "/quit", "unheard")
    assert talker.asked == [(["first"], ["a.png"]), (["second"], ["a.png"])]


def test_a_picture_that_cannot_be_read_is_an_error_not_the_end(monkeypatch, capsys):
    talker = Talker([DataError("nowhere.png: no such file")], ["fine"])
    talk(monkeypatch, talker, "/image nowhere.png", "what?", "/image", "and now?")
    assert "error: nowhere.png" in capsys.readouterr().out
    assert talker.asked[1] == (["and now?"], [])


@pytest.mark.parametrize("pieces", [[], [" ", "\n"], [KeyboardInterrupt()]])
def test_an_answer_without_words_leaves_no_trace(monkeypatch, pieces):
    talker = Talker(pieces, ["yes"])
    talk(monkeypatch, talker, "what?", "again?")
    assert talker.asked[1][0] == ["again?"]


def test_beams_are_known_only_when_all_is_said():
    talker = Talker()
    talker.generate = lambda requests, generation: [types.SimpleNamespace(text=f"{len(requests)} with {generation.num_beams}")]
    assert chat.answer(talker, None, GenerationConfig(num_beams=3)) == "1 with 3"
