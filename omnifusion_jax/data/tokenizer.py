"""Text to token ids and back."""

import hashlib
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend

from omnifusion_jax.errors import DataError

NAMES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}  # unless tokenizer_config.json has others


def text(token):
    return token["content"] if isinstance(token, dict) else token


class Tokenizer:
    """A `tokenizer.json` beside its `tokenizer_config.json`. Adds no special tokens of its own; each piece of text is encoded alone.

    `eos`, `pad` and `unk` are token ids. The unknown token is the padding, as OmniFusion has it; of a tokenizer without
    one (`unk` is None), as those of Llama 3 and Qwen, the padding is its own, or else the end of sequence.
    """

    def __init__(self, directory):
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
        settings = self.directory / "tokenizer_config.json"
        names = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        self.names = {
            f"{role}_token": text(names.get(f"{role}_token") or default) for role, default in NAMES.items()
        }
        self.eos, self.unk = (
            self._id("eos_token"),
            self._id("unk_token", missing=names.get("unk_token") is None),
        )
        own = self.backend.token_to_id(text(names.get("pad_token") or "") or "")
        self.pad = next(i for i in (self.unk, own, self.eos) if i is not None)
        self.adds_bos = names.get(
            "add_bos_token",
            self.backend.encode("").ids[:1] == [self.backend.token_to_id(self.names["bos_token"])],
        )
        settings = json.dumps([self.names, self.adds_bos], sort_keys=True)
        self.digest = hashlib.sha256(file.read_bytes() + settings.encode()).hexdigest()[
            :16
        ]  # of all that its ids follow from

    def _id(self, name, missing=False):
        """The id of one of `names`; where it is `missing` from the settings there may be none."""
        token = self.names[name]
        found = self.backend.token_to_id(token)
        if found is None and not missing:
            raise DataError(
                f"{self.directory}: tokenizer_config.json names {token!r}, which tokenizer.json does not know"
            )
        return found

    @property
    def ends(self):
        """Ids as config.json of Hugging Face names them: bos_token_id, where there is one, and eos_token_id."""
        bos = self.backend.token_to_id(self.names["bos_token"])
        return ({} if bos is None else {"bos_token_id": bos}) | {"eos_token_id": self.eos}

    @property
    def vocab(self):
        return self.backend.get_vocab_size()

    def for_vocabulary(self, vocab):
        """Itself, if every one of its ids is below `vocab`, the rows of a model's embedding; else DataError."""
        if self.vocab > vocab:
            raise DataError(
                f"{self.directory} has {self.vocab} tokens, model.decoder.vocab is {vocab}: they belong to two models"
            )
        return self

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, text):
        """A whole prompt, beginning-of-sequence token included where the tokenizer adds one: (int32[n] ids, int[n, 2] places in `text`)."""
        found, bos = self.backend.encode(text, add_special_tokens=False), self.names["bos_token"]
        ids, places = found.ids, found.offsets
        if self.adds_bos and not text.startswith(bos):
            ids, places = [self._id("bos_token"), *ids], [(0, 0), *places]
        return np.array(ids, np.int32), np.array(places)

    def mark(self, token):
        """The id of `token`, which from now on is cut out of texts as a whole, whether the vocabulary has it or not."""
        self.backend.add_special_tokens([token])
        return self.backend.token_to_id(token)

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=True)
