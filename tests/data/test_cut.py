"""Dialogues that are too long are cut after the last answer that fits."""

import numpy as np
import pytest
import tiny

from omnifusion_jax.data.layout import Layout
from omnifusion_jax.errors import DataError


def turns(*texts):
    return tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def cut_at(tokenizer, length, dialogue, images=0, **settings):
    layout = Layout(tokenizer, tiny.config(**settings), length, cut=True)
    return layout(dialogue, [tiny.picture(np.zeros((24, 24, 3), np.uint8), 8) for _ in range(images)])


@pytest.mark.parametrize("name", ["omnifusion", "text"])
def test_a_cut_ends_after_the_last_answer_that_fits(tokenizer, name):
    """What is left is laid out as if nothing had followed, and says how many turns were cut off."""
    talk = turns("What?", "A red circle.", "And?", "A blue square.", "And then?", "red " * 9)
    parts = [tiny.dialogue(talk[:n]) for n in (2, 4, 6)]
    free = [cut_at(tokenizer, 999, part, layout=name) for part in parts]
    lengths = [len(sample.tokens) for sample in free]
    assert lengths[0] < lengths[1] < lengths[2] and [sample.cut for sample in free] == [0, 0, 0]
    for length, kept in [
        (lengths[2], 2),
        (lengths[2] - 1, 1),
        (lengths[1], 1),
        (lengths[1] - 1, 0),
        (lengths[0], 0),
    ]:
        sample = cut_at(tokenizer, length, parts[2], layout=name)
        assert sample.cut == (0, 2, 4)[2 - kept]
        for column, expected in zip(sample[:4], free[kept][:4], strict=True):
            np.testing.assert_array_equal(column, expected)
    with pytest.raises(DataError, match=f"{lengths[2]} tokens, but max_length is {lengths[0] - 1}") as caught:
        cut_at(tokenizer, lengths[0] - 1, parts[2], layout=name)
    assert caught.value.reason == "too_long"
    with pytest.raises(DataError, match="but max_length is"):
        Layout(tokenizer, tiny.config(layout=name), lengths[1])(parts[2], [])


def test_pictures_of_turns_that_are_cut_off_go_with_them(tokenizer):
    talk = turns(
        "<image>What?", "A red circle.", "<image>And <image>this?", "A blue square.", "Sure?", "Yes " * 30
    )
    dialogue = tiny.dialogue(talk, *[np.zeros((24, 24, 3), np.uint8)] * 3)
    whole = cut_at(tokenizer, 999, dialogue, 3)
    two = cut_at(tokenizer, len(whole.tokens) - 1, dialogue, 3)
    one = cut_at(tokenizer, len(two.tokens) - 1, dialogue, 3)
    assert [(s.items, len(s.media["image"][0]), s.cut) for s in (whole, two, one)] == [
        (3, 3, 0),
        (3, 3, 2),
        (1, 1, 4),
    ]


def test_pictures_that_no_turn_marks_stay(tokenizer):
    talk = turns("What?", "A red circle.", "And?", "A blue square.")
    dialogue = tiny.dialogue(talk, *[np.zeros((24, 24, 3), np.uint8)] * 2)
    whole = cut_at(tokenizer, 999, dialogue, 2)
    shorter = cut_at(tokenizer, len(whole.tokens) - 1, dialogue, 2)
    assert (shorter.items, len(shorter.media["image"][0]), shorter.cut) == (2, 2, 2)


def test_a_question_behind_the_last_answer_is_cut_off(tokenizer):
    talk = turns("What?", "A red circle.", "And then? " * 9)
    fits = cut_at(tokenizer, 999, tiny.dialogue(talk[:2]))
    sample = cut_at(tokenizer, len(fits.tokens), tiny.dialogue(talk))
    assert sample.tokens.tolist() == fits.tokens.tolist() and sample.cut == 1


def test_questions_are_never_cut(tokenizer):
    dialogue = tiny.dialogue(turns("What?", "A red circle.", "And? " * 40))
    with pytest.raises(DataError, match="but max_length is 40"):
        Layout(tokenizer, tiny.config(), 40, cut=True)(dialogue, [], ask=True)
