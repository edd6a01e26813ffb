"""The released tokenizer and special vectors, where they lie beside the repository."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiny

from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer, with_tokens
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import CheckpointError

REAL = Path(__file__).parents[2].parent / "shared/data/omnifusion_1_1"
SPECIAL = ("USER", "BOT", "SOI", "EOI")


@pytest.mark.skipif(not REAL.is_dir(), reason="the released tokenizer is not beside the repository")
def test_the_released_tokenizer_from_its_sentencepiece_model(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copyfile(REAL / "tokenizer.model", tmp_path / "tokenizer.model")
    shutil.copyfile(REAL / "tokenizer_config.json", tmp_path / "tokenizer_config.json")
    converted, released = Tokenizer(fast_tokenizer(tmp_path)), Tokenizer(REAL)
    assert converted.encode(tiny.PROMPT) == [851, 349, 264, 10436, 395, 16107, 13892, 28723, 13]
    models = [json.loads(t.backend.to_str())["model"] for t in (converted, released)]
    assert models[0]["vocab"] == models[1]["vocab"] and models[0]["merges"] == models[1]["merges"]
    for text in (
        "<image>\nWhat?",
        "</s>",
        "  two  spaces ",
        "\u0427\u0442\u043e   \u043d\u0430?",
        "\u65e5\u672c\x01\t",
    ):
        assert converted.encode(text) == released.encode(text)
    assert fast_tokenizer(tmp_path) == converted.directory  # cached
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    assert (converted.eos, Tokenizer(fast_tokenizer(tmp_path)).eos) == (2, 1)  # by content
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="not a sentencepiece model"):
        fast_tokenizer(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"never read")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match=r"cannot be written there\. Set XDG_CACHE_HOME to a folder"):
        fast_tokenizer(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="the released special vectors are not beside the repository")
def test_the_released_special_vectors():
    tensors = open_tensors(REAL / "special_embeddings.pt")
    norms = {name: round(float(np.linalg.norm(tensors[name].astype(np.float32))), 4) for name in SPECIAL}
    assert norms == {"USER": 1.0051, "BOT": 0.9803, "SOI": 1.0024, "EOI": 0.9946}


PIECES = ("<image>", "</image>", "<image>s")  # user-defined; one begins with another


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A directory with the sentencepiece model of a small corpus, and what it says itself."""
    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    with file.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny.CORPUS * 20),
            model_writer=out,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            user_defined_symbols=list(PIECES),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return file.parent, sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.fixture
def directory(pieces, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copyfile(pieces[0] / "tokenizer.model", tmp_path / "tokenizer.model")
    return tmp_path


def test_user_defined_pieces_stay_whole(pieces, directory):
    converted, original = Tokenizer(fast_tokenizer(directory)), pieces[1]
    for text in (
        "<image>What is in the picture?",
        "a <image> <image>s</image>\nHow many circles?",
        "<image></image><image>s s<image",
        "  two  spaces and a blue square",
        "Что <image>?",
    ):
        assert converted.encode(text) == original.encode(text)
    assert original.piece_to_id("<image>s") in converted.encode("a<image>s")  # the longest one
    assert with_tokens(converted.directory, PIECES) == converted.directory  # nothing is left to add
    added = Tokenizer(with_tokens(converted.directory, ("</image>", "<slice>")))
    assert {len(original), original.piece_to_id("</image>")} < set(added.encode("a<slice>b</image>"))


def test_added_tokens_have_the_ids_that_they_were_given(pieces, directory):
    """In the order of their ids, not of the file; those that a model needs besides follow."""
    first = len(pieces[1])
    ids = {"<im_end>": first + 2, "<im_patch>": first, "<im_start>": first + 1, "</s>": 2}
    (directory / "added_tokens.json").write_text(json.dumps(ids))
    converted = Tokenizer(fast_tokenizer(directory))
    assert converted.encode("<im_start><im_patch><im_end>") == [first + 1, first, first + 2]
    # The same beside a tokenizer.json that lacks them
    (directory / "added_tokens.json").unlink()
    bare = directory / "bare"
    shutil.copytree(fast_tokenizer(directory), bare)
    (bare / "added_tokens.json").write_text(json.dumps(ids))
    found = Tokenizer(with_tokens(bare, ("<im_patch>", "<box>")))
    assert found.encode("<im_start><im_patch><box>") == [first + 1, first, first + 3]


def test_ids_that_added_tokens_cannot_have_are_refused(pieces, directory):
    first = len(pieces[1])
    (directory / "added_tokens.json").write_text(json.dumps({"<im_patch>": first + 5}))
    with pytest.raises(
        CheckpointError, match=f"gives '<im_patch>' the id {first + 5}, and the tokenizer has"
    ):
        fast_tokenizer(directory)
