"""Streaming text: every piece is final, and all pieces together are the text."""

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.streaming import INCOMPLETE, pieces


@pytest.mark.parametrize(
    "text", ["A red circle.", "Рыжий кот сидит на столе.", "ёж 中文 🙂 end", "a\nb", "  two  spaces ", ""]
)
def test_no_character_is_cut(tokenizer, text):
    found = list(pieces(tokenizer, tokenizer.encode(text)))
    assert "".join(found) == tokenizer.decode(tokenizer.encode(text))
    assert not any(INCOMPLETE in piece or piece == "" for piece in found)


@pytest.fixture(scope="module")
def by_bytes(tmp_path_factory):
    """A vocabulary of bytes, as GPT-2's family has it: no piece has a name that gives it away, and each alone
    is shown as incomplete.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    backend = Backend(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    directory = tmp_path_factory.mktemp("bytes")
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


@pytest.mark.parametrize("text", ["ёж", "中文", "a🙂b"])
def test_no_byte_of_a_character_is_shown_alone(by_bytes, text):
    """Every piece is a whole character, in a vocabulary without byte fallback too."""
    ids = by_bytes.encode(text)
    assert len(ids) == len(text.encode()) and INCOMPLETE in by_bytes.decode(
        ids[:1] if text[0] != "a" else ids[:2]
    )
    assert list(pieces(by_bytes, ids)) == list(text)


def test_words_come_as_soon_as_they_are_known(tokenizer):
    ids = tokenizer.encode("There are two circles.")
    found = list(pieces(tokenizer, ids))
    assert len(found) > 3


@settings(max_examples=200)
@given(st.lists(st.integers(0, tiny.VOCAB - 1), max_size=30))
def test_any_tokens(tokenizer, tokens):
    sent = ""
    for piece in pieces(tokenizer, tokens):
        sent += piece
        assert tokenizer.decode(tokens).startswith(sent)
    assert sent == tokenizer.decode(tokens)
