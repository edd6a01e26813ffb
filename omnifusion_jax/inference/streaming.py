"""Decodes text that grows token by token."""

import re
from collections.abc import Iterable, Iterator

from omnifusion_jax.data.tokenizer import Tokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how vocabularies with byte fallback name the token of a single byte
INCOMPLETE = "\ufffd"  # what decoders write for bytes that do not make a character (yet)


def final_text(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The part of `tokenizer.decode(tokens)` that no further token can change.

    A character may take several tokens. A run of single bytes is decoded as a whole, and one more byte can
    change all of it, so the run is held back until another token follows. An incomplete character is held
    back too.
    """
    end = len(tokens)
    while end and runs_on(tokenizer, tokens[end - 1]):
        end -= 1
    return tokenizer.decode(tokens[:end]).rstrip(INCOMPLETE)


def runs_on(tokenizer, token):
    """Whether bytes before and after `token` are decoded together.

    They are if the token is a byte itself, or if decoding leaves it out.
    """
    return bool(BYTE.fullmatch(tokenizer.backend.id_to_token(token) or "")) or not tokenizer.decode([token])


def pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of token ids piece by piece; joined, the pieces are `tokenizer.decode` of all ids."""
    seen, sent = [], 0
    for token in tokens:
        seen.append(token)
        text = final_text(tokenizer, seen)
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)
    if rest := tokenizer.decode(seen)[sent:]:
        yield rest
