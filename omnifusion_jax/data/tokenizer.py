"""Text to token ids and back."""

import json
from pathlib import Path

from tokenizers import Tokenizer as Backend

from omnifusion_jax.errors import DataError


class Tokenizer:
    """A `tokenizer.json` beside its `tokenizer_config.json`. Adds no special tokens of its own; each piece of text is encoded alone.

    `eos` and `pad` are token ids; the unknown token is the padding, as OmniFusion has it.
    """

    def __init__(self, directory):
        self.directory = Path(directory)
        file = self.directory / "tokenizer.json"
        if not file.is_file():
            raise DataError(f"{file} is missing: a tokenizer directory holds tokenizer.json and tokenizer_config.json")
        try:
            self.backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{file}: not a tokenizer ({error!s:.200}). Copy or download it again") from error
        self.backend.no_padding()
        self.backend.no_truncation()
        settings = self.directory / "tokenizer_config.json"
        names = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        self.eos = self._id(names.get("eos_token") or "</s>")
        self.pad = self._id(names.get("unk_token") or "<unk>")

    def _id(self, token):
        token = token["content"] if isinstance(token, dict) else token
        found = self.backend.token_to_id(token)
        if found is None:
            raise DataError(f"{self.directory}: tokenizer_config.json names {token!r}, which tokenizer.json does not know")
        return found

    @property
    def vocab(self):
        return self.backend.get_vocab_size()

    def fits(self, vocab):
        """Itself, if every one of its ids is below `vocab`, the rows of a model's embedding; else DataError."""
        if self.vocab > vocab:
            raise DataError(f"{self.directory} has {self.vocab} tokens, model.decoder.vocab is {vocab}: they belong to two models")
        return self

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=True)
