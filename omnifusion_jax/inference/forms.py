"""Answers of a given form: one of some choices, text that a regular expression matches, or JSON by a schema.

llguidance follows the form byte by byte, so tokens may cut it anywhere. Before each token it tells which may
come next: exactly those after which the answer can still become complete, the end of sequence where it is.
"""

import functools
import itertools
import json
from typing import Self

import llguidance
import numpy as np

from omnifusion_jax.config import GenerationConfig, check
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.stops import added

# Where the form leaves one text only, llguidance would leave one way to cut it into tokens.
EXACT = '%llguidance {"no_forcing": true}\n'


class Guide:
    """How far an answer has come in its form."""

    def __init__(self, matcher: llguidance.LLMatcher, end: int, length: int = 0):
        """`end` is the token that ends answers, `length` the number of tokens so far."""
        self.matcher, self.end, self.length = matcher, end, length
        self.over = False  # nothing may come next

    def mask(self) -> np.ndarray:
        """A packed mask uint32[words] of the tokens that may come next."""
        return np.uint32([0]) if self.over else np.frombuffer(self.matcher.compute_bitmask(), "<u4")

    def after(self, token: int) -> Self:
        """The Guide of the answer with a token more.

        Where fewer answers are possible than a search has beams, the others have tokens that are not allowed.
        """
        found = Guide(self.matcher.deep_copy(), self.end, self.length + 1)
        found.over = self.over or token == self.end or not found.matcher.try_consume_tokens([token])
        return found

    @property
    def error(self) -> str:
        """Why the form cannot be followed any more; "": it can."""
        return self.matcher.get_error()


def guides(g: GenerationConfig, tokenizer: Tokenizer, vocab: int, count: int) -> list[Guide]:
    """A Guide for each of `count` rows; none where no form is asked for. Raises ConfigError as `matcher`."""
    if not g.form:
        return []
    first = matcher(g.form, getattr(g, g.form), tokenizer, vocab).deep_copy()
    return [Guide(first, tokenizer.eos)] * count


@functools.lru_cache(32)
def matcher(form: str, value, tokenizer: Tokenizer, vocab: int) -> llguidance.LLMatcher:
    """What follows a form from its beginning.

    Raises:
      ConfigError: the form cannot be met, or llguidance does not know it.
    """
    known = tokens(tokenizer, vocab)
    grammar = EXACT + FORMS[form](value, drops_space(tokenizer, vocab))
    found = llguidance.LLMatcher(known, grammar, log_level=0)
    why = found.get_error().splitlines()
    check(not found.is_error(), f"generation.{form} cannot be followed: {'; '.join(why[:1])}")
    return found


def drops_space(tokenizer: Tokenizer, vocab: int) -> bool:
    """Whether a space that a text begins with is lost when its tokens are decoded, as with Llama's."""
    begun = (token for token, text in enumerate(added(tokenizer, vocab)) if text.startswith(b" "))
    return any(not tokenizer.decode([token]).startswith(" ") for token in itertools.islice(begun, 1))


# Of a text whose first space would be lost there are two forms: with one more space, and as it is if it has
# none to lose.


def one_of_choices(choices: tuple[str, ...], drops: bool) -> str:
    """A grammar."""
    texts = [text for text in choices if not (drops and text.startswith(" "))]
    texts += [" " + text for text in choices if drops]
    return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)


def by_regex(regex: str, drops: bool) -> str:
    form = f"F: /{llguidance.regex_to_lark(f'(?:{regex})', '')}/"
    return f'start: A | B\nA: " " F\nB: F & ~/ (?s:.)*/\n{form}' if drops else f"start: F\n{form}"


def by_schema(schema: str, drops: bool) -> str:
    space = '" "? ' if drops else ""
    return f"start: {space}value\nvalue: %json {schema}"


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
