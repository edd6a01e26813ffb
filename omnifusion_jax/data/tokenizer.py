"""Text to token ids and back."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np
from tokenizers import Tokenizer as Backend

from omnifusion_jax.errors import DataError

NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}  # unless tokenizer_config.json names others


def text(token):
    """The text of a token in tokenizer_config.json, which gives it as a string or as an object."""
    return token["content"] if isinstance(token, dict) else token


class Tokenizer:
    """The tokenizer of a directory with `tokenizer.json` and, if it has one, `tokenizer_config.json`.

    `encode` adds no special tokens. `bos`, `eos`, `pad` and `unk` are token ids, `bos` None if
    the vocabulary has none. The unknown token is the padding,
    as in OmniFusion. A tokenizer without one (`unk` is None), like those of Llama 3 and Qwen, pads with its
    own padding token, or else with the end-of-sequence token.

    `digest` identifies everything that its ids follow from.

    Raises:
      DataError: tokenizer.json is missing, one of the two files is damaged, or tokenizer.json lacks a token
        that tokenizer_config.json names or that is usual (see NAMES).
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise DataError(
                f"{file} is missing: a tokenizer directory holds tokenizer.json and tokenizer_config.json"
            )
        try:
            self.backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{file}: not a tokenizer ({error!s:.200}). Copy or download it again") from error
        self.backend.no_padding()
        self.backend.no_truncation()
        config = self.directory / "tokenizer_config.json"
        try:
            names = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        except ValueError as error:
            raise DataError(f"{config}: not JSON ({error}). Copy or download it again") from error
        self.names = {
            f"{role}_token": text(names.get(f"{role}_token") or default) for role, default in NAMES.items()
        }
        self.eos = self._id("eos_token")
        self.unk = self._id("unk_token", missing=names.get("unk_token") is None)
        own = self.backend.token_to_id(text(names.get("pad_token") or "") or "")
        self.pad = next(i for i in (self.unk, own, self.eos) if i is not None)
        self.bos = self.backend.token_to_id(self.names["bos_token"])
        self.adds_bos = names.get("add_bos_token", self.backend.encode("").ids[:1] == [self.bos])
        settings = json.dumps([self.names, self.adds_bos], sort_keys=True)
        self.digest = hashlib.sha256(file.read_bytes() + settings.encode()).hexdigest()[:16]

    def _id(self, name, missing=False):
        """The id of a token in `names`; None if the vocabulary lacks it and it may be `missing`."""
        token = self.names[name]
        found = self.backend.token_to_id(token)
        if found is None and not missing:
            raise DataError(
                f"{self.directory}: tokenizer.json does not know the {name} {token!r}. "
                "Name the right one in tokenizer_config.json"
            )
        return found

    @property
    def ends(self) -> dict[str, int]:
        """`eos_token_id` and, if there is one, `bos_token_id`, as in config.json of Hugging Face."""
        return ({} if self.bos is None else {"bos_token_id": self.bos}) | {"eos_token_id": self.eos}

    @property
    def vocab(self) -> int:
        """The number of tokens."""
        return self.backend.get_vocab_size()

    def for_vocabulary(self, vocab: int) -> Self:
        """Itself, if a model's embedding with `vocab` rows has one for every id. Raises DataError if not."""
        if self.vocab > vocab:
            raise DataError(
                f"{self.directory} has {self.vocab} tokens, model.decoder.vocab is {vocab}: "
                "they belong to two models"
            )
        return self

    def encode(self, text: str) -> list[int]:
        """The token ids of a piece of text, without special tokens around it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32[n] of a whole prompt, and int[n, 2], where each token starts and ends in `text`.

        The beginning-of-sequence token comes first if the tokenizer adds one; its place is (0, 0).
        """
        found = self.backend.encode(text, add_special_tokens=False)
        bos = self.names["bos_token"]
        ids, places = found.ids, found.offsets
        if self.adds_bos and not text.startswith(bos):
            ids, places = [self._id("bos_token"), *ids], [(0, 0), *places]
        return np.array(ids, np.int32), np.array(places)

    def mark(self, token: str) -> int:
        """The id of `token`, which is never split from now on, and is added to the vocabulary if need be."""
        self.backend.add_special_tokens([token])
        return self.backend.token_to_id(token)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)
