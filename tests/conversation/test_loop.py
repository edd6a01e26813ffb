"""Lines of a chat: what is asked, what is printed, what Ctrl-C stops."""

import re
import types

import pytest
from conftest import run_command
from PIL import Image

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.conversation.loop import converse
from omnifusion_jax.conversation.talk import Shown, Talk
from omnifusion_jax.data.dialogues import from_request
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.prompts import question
from omnifusion_jax.models.presets import preset


class Talker:
    """Streams what it is given; an exception in the list is raised there."""

    def __init__(self, *answers):
        self.answers, self.asked, self.drawn = iter(answers), [], []

    def stream(self, request, generation):
        dialogue = from_request(request)
        texts = tuple(text for _, text in dialogue.turns)
        self.asked.append((texts, tuple(picture.getpixel((0, 0)) for picture in dialogue.images)))
        self.drawn.append(generation)
        for piece in next(self.answers):
            if isinstance(piece, BaseException):
                raise piece
            yield piece


def talk(talker, *lines, **options):
    """(how many of these lines were in vain, the Talk afterwards)."""
    held = Talk(talker, GenerationConfig())
    return converse(held, lines, **options), held


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def red(tmp_path):
    Image.new("RGB", (8, 8), RED).save(tmp_path / "red.png")
    return tmp_path / "red.png"


@pytest.fixture
def blue(tmp_path):
    Image.new("RGB", (8, 6), BLUE).save(tmp_path / "a blue one.png")
    return tmp_path / "a blue one.png"


def test_turns_are_remembered_and_ctrl_c_stops_only_the_answer(capsys):
    talker = Talker(["a ", "cat"], ["it ", "is ", KeyboardInterrupt(), "never"], ["yes"])
    assert talk(talker, "what?", "", "which?", "sure?")[0] == 0
    assert talker.asked[1][0] == ("what?", "a cat", "which?")
    assert talker.asked[2][0] == ("what?", "a cat", "which?", "it is ", "sure?")
    assert capsys.readouterr().out == "a cat\nit is  [stopped]\nyes\n"


def test_pictures_stand_in_the_turn_that_they_were_shown_with(red, blue, capsys):
    talker = Talker(["one"], ["two"], ["three"])
    talk(talker, f"/image {red}", "first", f"what is '{blue}' ?", "third", "/quit", "unheard")
    assert talker.asked == [
        (("<image>\nfirst",), (RED,)),
        (("<image>\nfirst", "one", "<image>\nwhat is ?"), (RED, BLUE)),
        (("<image>\nfirst", "one", "<image>\nwhat is ?", "two", "third"), (RED, BLUE)),
    ]
    said = capsys.readouterr()
    assert said.out == "one\ntwo\nthree\n"  # and nothing else
    assert said.err == f"[picture 1: {red}, 8 x 8]\n[picture 2: {blue}, 8 x 6]\n"


def test_several_pictures_at_once(red, blue):
    talker = Talker(["one"])
    talk(talker, f"/image '{blue}' {red}", "both?")
    assert talker.asked == [(("<image>\n<image>\nboth?",), (BLUE, RED))]


def test_undo_takes_back_what_came_last(red, blue, capsys):
    talker = Talker(*["again"] * 4)
    lines = ("first", f"/image {red}", "second", "/undo", "other", "/undo", "/undo", "third")
    vain, held = talk(talker, *lines, *["/undo"] * 3)
    assert talker.asked[2:] == [
        (("first", "again", "<image>\nother"), (RED,)),
        (("first", "again", "third"), ()),
    ]
    assert not vain and not held.past.turns and not held.past.waiting
    assert "there is nothing to take back" in capsys.readouterr().err


def test_reset_forgets_all(red):
    talker = Talker(["one"], ["two"])
    talk(talker, f"/image {red}", "first", "/reset", "second")
    assert talker.asked[1] == (("second",), ())


def test_set_changes_how_answers_are_drawn(capsys):
    talker = Talker(["one"], ["two"])
    lines = (
        "/set temperature 0.7",
        "/set seed=3",
        "first",
        "/set top_p 3",
        "/set temprature 1",
        "/set seed x",
    )
    assert talk(talker, *lines, "second", "/set seed")[0] == 3
    assert talker.drawn == [GenerationConfig(temperature=0.7, seed=3)] * 2
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "temperature is 0.7" and said[-1] == "seed is 3"
    assert said[2] == "error: top_p 3.0 is not in (0, 1]" and "is temperature meant?" in said[3]
    assert said[4] == "error: seed x: a whole number is expected"


def test_what_is_saved_is_training_data(red, tmp_path):
    file = tmp_path / "saved talks.jsonl"
    talker = Talker(["one"], ["two"], ["three"])
    talk(talker, f"/image {red}", "first", "second", f"/save {file}", "/reset", "third", f"/save '{file}'")
    saved = open_source(str(file), "", 24)
    said = [(one.turns, [str(picture) for picture in one.images]) for one in saved]
    first = (("user", "<image>\nfirst"), ("assistant", "one"), ("user", "second"), ("assistant", "two"))
    assert said == [(first, [str(red)]), ((("user", "third"), ("assistant", "three")), [])]


def test_what_cannot_be_saved_is_said(tmp_path, capsys):
    assert talk(Talker(["one"]), f"/save {tmp_path}/a.jsonl", "first", "/save", f"/save {tmp_path}")[0] == 3
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "error: nothing was said that could be saved" and "needs the name" in said[1]
    assert said[2] == f"error: {tmp_path}: Is a directory. Name another file"


def test_a_picture_that_cannot_be_opened_changes_nothing(red, tmp_path, capsys):
    talker = Talker(["one"], ["two"])
    vain, _ = talk(talker, f"/image {red}", "first", f"/image {red} {tmp_path}/nowhere.png", "second")
    assert vain == 1 and talker.asked[1] == (("<image>\nfirst", "one", "second"), (RED,))
    assert f"error: {tmp_path}/nowhere.png" in capsys.readouterr().err


def test_a_command_that_is_none_is_not_said_to_the_model(capsys):
    talker = Talker(["fine"])
    assert talk(talker, "/imagine a cat", "hello", "/nowhere/cat.png what is it?")[0] == 2
    assert [texts for texts, _ in talker.asked] == [("hello",)]
    assert "there is no /imagine, neither a command nor a picture" in capsys.readouterr().err


def test_a_turn_that_fails_is_taken_back(red, capsys):
    talker = Talker([DataError("request: no")], ["fine"])
    assert talk(talker, f"/image {red}", "what?", "and now?")[0] == 1
    assert "error: request: no" in capsys.readouterr().err
    assert talker.asked[1] == (("<image>\nand now?",), (RED,))


@pytest.mark.parametrize("pieces", [[], [" ", "\n"], [KeyboardInterrupt()]])
def test_an_answer_without_words_leaves_no_trace(pieces):
    talker = Talker(pieces, ["yes"])
    talk(talker, "what?", "again?")
    assert talker.asked[1][0] == ("again?",)


def test_beams_are_known_only_when_all_is_said(capsys):
    talker = Talker()
    answer = lambda requests, generation: types.SimpleNamespace(
        text=f"{len(requests)} with {generation.num_beams}"
    )
    talker.generate = lambda *asked: [answer(*asked)]
    talk(talker, "/set num_beams 3", "what?")
    assert capsys.readouterr().out == "1 with 3\n"


def test_ctrl_c_stops_beams_too(capsys):
    def generate(requests, generation):
        raise KeyboardInterrupt

    talker = Talker()
    talker.generate = generate
    assert not talk(talker, "/set num_beams 3", "what?")[1].past.turns
    assert "[stopped]" in capsys.readouterr().out


def test_verbose_says_how_long_it_took(capsys):
    talk(Talker(["a ", "cat"], []), "what?", "nothing?", verbose=True)
    said = capsys.readouterr().err
    assert re.fullmatch(r"\[first words after 0\.\d\d s, all after 0\.\d\d s\]\n", said)


def test_the_terminal_draws_what_is_shown(red, blue, capsys):
    held = Talk(Talker(), GenerationConfig(), [Shown.of(str(red))])
    converse(held, [f"/image '{blue}'"], draw=lambda image: f"<{image.getpixel((0, 0))}>")
    assert re.findall(r"<(.*?)>", capsys.readouterr().err) == [str(RED), str(BLUE)]


class Short(Talker):
    """Reads as much as the bundled model does of its own layout, were its context `most` tokens long."""

    def __init__(self, most, *answers):
        super().__init__(*answers)
        self.prepare = Prepare.of(
            Tokenizer(locate("omnifusion-tiny-decoder")), preset("omnifusion-tiny"), most
        )

    def stream(self, request, generation):
        question(request, "request", self.prepare, generation.max_new_tokens)
        return super().stream(request, generation)


ANSWERS = [["word " * 20]] * 9


def test_turns_that_no_longer_fit_are_left_out_and_their_pictures_stay(red, capsys):
    talker = Short(256, *ANSWERS)
    _, held = talk(talker, f"/image {red}", *map(str, range(6)))
    said = capsys.readouterr().err
    turns = [len(texts) // 2 for texts, _ in talker.asked]
    kept = turns[-1]
    assert 0 < kept < 5 and turns == [min(i, kept) for i in range(6)]
    assert [pictures for _, pictures in talker.asked] == [(RED,)] * 6
    assert talker.asked[-1][0][0] == f"<image>\n{5 - kept}"
    assert len(held.past.turns) == kept + 1
    full = "[the model's context is full: the oldest 1 question left out]\n"
    assert said.count(full) == 5 - kept


def test_pictures_leave_when_no_turn_is_left(red, blue, capsys):
    talker = Short(190, *ANSWERS)  # a picture takes 36 positions, an answer 128 at most
    talk(talker, f"/image {red}", "0", f"/image '{blue}'", "1")
    assert talker.asked[1] == (("<image>\n1",), (BLUE,))
    assert "the oldest 1 question and 1 picture left out]" in capsys.readouterr().err


def test_of_pictures_whose_turns_left_the_oldest_leave_first(red, blue):
    talker = Short(236, *ANSWERS)  # two pictures and a question, without the turn before
    talk(talker, f"/image {red}", "0", f"/image '{blue}'", "1", f"/image {red}", "2")
    pictures = "<image>\n" * 2
    assert talker.asked[1:] == [((f"{pictures}1",), (RED, BLUE)), ((f"{pictures}2",), (BLUE, RED))]


def test_a_question_that_never_fits_leaves_the_talk_as_it_was(red):
    talker = Short(256, *ANSWERS)
    vain, held = talk(talker, f"/image {red}", "0", "1 " * 200, "2")
    assert vain == 1 and talker.asked[1][0][0] == "<image>\n0" and len(held.past.turns) == 2


def test_a_wrong_picture_stops_before_the_model_is_loaded(tmp_path):
    said = run_command("chat", f"--image={tmp_path}/nowhere.png", "--model=/nowhere", fails=True)
    assert said.count("\n") == 1 and said.startswith("error: ") and f"{tmp_path}/nowhere.png" in said
