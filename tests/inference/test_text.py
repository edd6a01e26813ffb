"""Streaming text: every piece is final, and all pieces together are the text."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifusion_jax.inference.text import INCOMPLETE, pieces


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", ["A red circle.", "Рыжий кот сидит на столе.", "ёж 中文 🙂 end", "a\nb", "  two  spaces ", ""])
def test_no_character_is_cut(tokenizer, text):
    found = list(pieces(tokenizer, tokenizer.encode(text)))
    assert "".join(found) == tokenizer.decode(tokenizer.encode(text))
    assert not any(INCOMPLETE in piece or piece == "" for piece in found)


def test_words_come_as_soon_as_they_are_known(tokenizer):
    ids = tokenizer.encode("There are two circles.")
    found = list(pieces(tokenizer, ids))
    assert len(found) > 3


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, tiny.VOCAB - 1), max_size=30))
def test_any_tokens(tokenizer, tokens):
    sent = ""
    for piece in pieces(tokenizer, tokens):
        sent += piece
        assert tokenizer.decode(tokens).startswith(sent)
    assert sent == tokenizer.decode(tokens)
