"""Text that grows token by token."""

import re

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how vocabularies with byte fallback name a piece that is one byte
INCOMPLETE = "\ufffd"  # what decoders put where bytes do not make a character (yet)


def final_text(tokenizer, tokens):
    """The part of `tokenizer.decode(tokens)` that no further token can change.

    A character may take several tokens. A run of single bytes is decoded as a whole (one byte more can undo it), so it is held back until something
    else follows; so is a character that is not complete.
    """
    end = len(tokens)
    while end and runs_on(tokenizer, tokens[end - 1]):
        end -= 1
    return tokenizer.decode(tokens[:end]).rstrip(INCOMPLETE)


def runs_on(tokenizer, token):
    """Whether bytes before and after `token` would be decoded together: it is a byte itself, or decoding leaves it out."""
    return bool(BYTE.fullmatch(tokenizer.backend.id_to_token(token) or "")) or not tokenizer.decode([token])


def pieces(tokenizer, tokens):
    """Yields the text of an iterable of token ids bit by bit; together the bits are `tokenizer.decode` of all."""
    seen, sent = [], 0
    for token in tokens:
        seen.append(token)
        text = final_text(tokenizer, seen)
        if len(text) > sent:
            yield text[sent:]
            sent = len(text)
    if rest := tokenizer.decode(seen)[sent:]:
        yield rest
