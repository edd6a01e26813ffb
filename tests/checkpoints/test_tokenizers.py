"""The released tokenizer and special vectors, where they lie beside the repository."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.checkpoints.tokenizers import fast_tokenizer
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
