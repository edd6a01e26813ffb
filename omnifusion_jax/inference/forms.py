"""Answers of a given form: one of some choices, text that a regular expression matches, or JSON by a schema.

llguidance follows the form byte by byte, so tokens may cut it anywhere. Before each token it tells which may
come next: exactly those after which the answer can still become complete, the end of sequence where it is.
"""

import functools
import json

import llguidance
import numpy as np

from omnifusion_jax.config import GenerationConfig, check
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.stops import added


class Guide:
    """How far an answer has come in its form."""

    def __init__(self, matcher: llguidance.LLMatcher, end: int):
        """`end` is the token that ends answers."""
        self.matcher, self.end = matcher, end
        self.length, self.ended = 0, False  # tokens that it has been given, and whether the last was the end

    def mask(self) -> np.ndarray:
        """A packed mask uint32[words] of the tokens that may come next."""
        return np.uint32([0]) if self.ended else np.frombuffer(self.matcher.compute_bitmask(), "<u4")

    def push(self, token: int):
        self.matcher.consume_token(token)
        self.length, self.ended = self.length + 1, token == self.end

    @property
    def error(self) -> str:
        """Why the form cannot be followed any more; "": it can."""
        return self.matcher.get_error()


def guides(g: GenerationConfig, tokenizer: Tokenizer, vocab: int, count: int) -> list[Guide]:
    """A Guide for each of `count` rows; none where no form is asked for. Raises ConfigError as `matcher`."""
    if not g.form:
        return []
    first = matcher(g.form, getattr(g, g.form), tokenizer, vocab)
    return [Guide(first.deep_copy(), tokenizer.eos) for _ in range(count)]


@functools.lru_cache(32)
def matcher(form: str, value, tokenizer: Tokenizer, vocab: int) -> llguidance.LLMatcher:
    """What follows a form from its beginning.

    Raises:
      ConfigError: the form cannot be met, or llguidance does not know it.
    """
    found = llguidance.LLMatcher(tokens(tokenizer, vocab), FORMS[form](value), log_level=0)
    why = found.get_error().splitlines()
    check(not found.is_error(), f"generation.{form} cannot be followed: {'; '.join(why[:1])}")
    return found


def one_of_choices(choices: tuple[str, ...]) -> str:
    """A grammar. Decoders drop a space that a text begins with, so there is one before each choice, or none
    where the choice has none to lose.
    """
    begun = [" " + text for text in choices] + [text for text in choices if not text.startswith(" ")]
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in begun)


def by_regex(regex: str) -> str:
    inside = llguidance.regex_to_lark(f"(?:{regex})", "")
    return f'start: A | B\nA: " " F\nB: F & ~/ (?s:.)*/\nF: /{inside}/'


def by_schema(schema: str) -> str:
    return f'start: " "? value\nvalue: %json {schema}'


# {field of GenerationConfig: its value as a grammar of llguidance}
FORMS = {"choices": one_of_choices, "regex": by_regex, "json_schema": by_schema}


@functools.lru_cache(4)
def tokens(tokenizer: Tokenizer, vocab: int) -> llguidance.LLTokenizer:
    """The tokens of a model that knows `vocab` of them, as llguidance takes them."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(tokenizer, vocab)), n_vocab=vocab)


class Vocabulary:
    """The bytes of each token, and which of them stand for no text, by the names that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self.eos_token_id, self.bos_token_id = tokenizer.eos, tokenizer.bos
        self.tokens = added(tokenizer, vocab)
        special = tokenizer.backend.get_added_tokens_decoder()
        self.special_token_ids = [token for token, told in special.items() if told.special]

        self.longest = max(map(len, self.tokens))
        self.ids = {
            text: token for token, text in enumerate(self.tokens) if token not in self.special_token_ids
        }

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that is forced, the longest first: a tokenizer may put a space before it."""
        found = []
        while text:
            size = next((n for n in range(self.longest, 0, -1) if text[:n] in self.ids), 0)
            if not size:
                break  # what no token stands for is left to the mask
            size = min(size, len(text))
            found.append(self.ids[text[:size]])
            text = text[size:]
        return found
