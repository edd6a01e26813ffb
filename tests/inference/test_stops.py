"""Stop strings against transformers, with tokenizers of every kind of decoder."""

import numpy as np
import pytest
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.generation.stopping_criteria import StopStringCriteria

from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.inference.stops import stopped, stops

STRINGS = ("circle", "\u2581", "\u20ac", "a r", " the", "\n\n", "eee", "ee", "\u044f\u0438", "?", "</s>")
CORPUS = [*tiny.CORPUS, "\u0434\u043b\u044f \u0438 \u044f\u0438 \u20ac\u20ac", "eeee ee\n\n\n"]


def byte_level(directory):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=tiny.RESERVED, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def word_pieces(directory):
    letters = sorted({*"".join(STRINGS), *"abcdef"} - {" ", "\n"})
    pieces = [*tiny.RESERVED, *letters, *(f"##{letter}" for letter in letters), "the", "##cle", "##ee"]
    backend = Backend(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


@pytest.fixture(scope="module", params=[tiny.make_tokenizer, byte_level, word_pieces])
def tokenizer(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def walk(found, tokens):
    """Whether each token completes a stop string."""
    state, ends = 0, []
    for token in tokens:
        after = int(found.move[found.kind[token], state])
        ends.append(after < 0)
        state = ~after if after < 0 else after
    return ends


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(STRINGS), min_size=1, max_size=3, unique=True))
def test_the_automaton(tokenizer, seed, strings):
    """Texts that are likely to have the strings in them, cut by tokens in any way."""
    rng = np.random.default_rng(seed)
    strings = [*strings, "??"]  # theirs wants one that can be written
    parts = [*strings, *CORPUS]
    text = "".join(parts[i][rng.integers(3) :] for i in rng.integers(0, len(parts), 6))
    tokens = [*tokenizer.encode(text), *rng.integers(3, tokenizer.vocab, 8).tolist()]
    found = stops(tokenizer, tokenizer.vocab + 3, tuple(strings))
    assert found.kind.shape == (tokenizer.vocab + 3,) and len(found.move) < 100
    theirs = StopStringCriteria(
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend), strings
    )
    ends = walk(found, tokens)
    for i in range(1, len(tokens) + 1):
        assert ends[i - 1] == bool(theirs(torch.tensor([tokens[:i]]), None))
        assert stopped(tokenizer, tuple(strings), tokens[:i]) == any(ends[:i])


def test_strings_that_are_too_long(tokenizer):
    with pytest.raises(ConfigError, match="stop_strings have 600 bytes in all, 512 are the most"):
        stops(tokenizer, tokenizer.vocab, ("\u044f" * 150, "a" * 300))
