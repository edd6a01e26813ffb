"""Strings that end an answer, wherever tokens cut them.

Each token adds some bytes to the text. An automaton over bytes (Aho and Corasick, 1975) knows how much of any
stop string the text ends with. What a token does to it is a function of its states, and few such functions
differ: most tokens forget everything. So a row keeps one number, its state, and a step is two look-ups.
"""

import functools
import itertools
import json
from typing import NamedTuple

import numpy as np

from omnifusion_jax.config import check
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.streaming import BYTE

MOST = 512  # bytes of all stop strings of a request: the states are as many
START = "abcdef"  # before a token, so that decoders which treat the beginning of a text differently do not


class Stops(NamedTuple):
    """The automaton of some stop strings; 0 is the state of an empty text."""

    kind: np.ndarray  # int16[vocab]: tokens of a kind do the same
    move: np.ndarray  # int16[kinds, states]: the state after it; where a string was completed, -1 minus that


@functools.lru_cache(32)
def stops(tokenizer: Tokenizer, vocab: int, strings: tuple[str, ...]) -> Stops:
    """The automaton over the tokens of a model that knows `vocab` of them.

    Raises:
      ConfigError: the strings are too long.
    """
    size = sum(len(string.encode()) for string in strings)
    check(size <= MOST, f"generation.stop_strings have {size} bytes in all, {MOST} are the most")
    goto, complete = automaton([string.encode() for string in strings])
    texts = [*added(tokenizer, tokenizer.vocab), *[b""] * (vocab - tokenizer.vocab)][:vocab]
    lengths = np.array([len(text) for text in texts])
    state = np.tile(np.arange(len(goto), dtype=np.int16), (vocab, 1))  # [vocab, states]
    ended = np.zeros(state.shape, bool)
    for i in range(lengths.max(initial=0)):
        longer = np.flatnonzero(lengths > i)
        byte = np.array([texts[token][i] for token in longer])
        state[longer] = goto[state[longer], byte[:, None]]
        ended[longer] |= complete[state[longer]]
    move, kind = np.unique(np.where(ended, ~state, state), axis=0, return_inverse=True)
    check(len(move) < 2**15, f"generation.stop_strings tell {len(move)} kinds of tokens apart; give fewer")
    return Stops(kind.reshape(vocab).astype(np.int16), move)


def stopped(tokenizer: Tokenizer, strings: tuple[str, ...], tokens: list[int]) -> bool:
    """Whether some tokens have one of the strings in their text."""
    if not strings:
        return False
    texts = added(tokenizer, tokenizer.vocab)
    text = b"".join(texts[token] for token in tokens if token < len(texts))
    return any(string.encode() in text for string in strings)


def automaton(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """(int16[states, 256], the state after a byte; bool[states], whether a string is complete)."""
    beginnings = sorted({string[:i] for string in strings for i in range(len(string) + 1)}, key=len)
    number = {text: i for i, text in enumerate(beginnings)}
    # Of a text the longest end counts that begins a string.
    kept = lambda text: next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)
    goto = np.zeros((len(beginnings), 256), np.int16)
    for text, byte in itertools.product(beginnings, sorted({*b"".join(strings)})):
        goto[number[text], byte] = kept(text + bytes([byte]))
    return goto, np.array([text.endswith(tuple(strings)) for text in beginnings])


@functools.lru_cache(4)
def added(tokenizer: Tokenizer, vocab: int) -> list[bytes]:
    """What each token adds to a text, as transformers 5 has it (generation/stopping_criteria.py)."""
    backend = tokenizer.backend
    decoder = json.dumps(json.loads(backend.to_str())["decoder"])
    fallback = '"ByteFallback"' in decoder
    by_bytes = '"ByteLevel"' in decoder and not fallback
    join = " ".join if backend.decoder is None else backend.decoder.decode
    before = backend.encode(START, add_special_tokens=False).tokens
    begun = len(join(before))
    found = []
    for token in map(backend.id_to_token, range(vocab)):
        if token is None:
            found.append(b"")
        elif by_bytes and all(character in CHARACTERS for character in token):
            found.append(bytes(map(CHARACTERS.get, token)))
        elif fallback and BYTE.fullmatch(token):
            found.append(bytes([int(token[3:5], 16)]))
        else:
            found.append(join([*before, token])[begun:].encode())
    return found


def characters() -> dict[str, int]:
    """The byte that each character stands for in vocabularies of bytes: printable ones stand for themselves,
    all others, in their order, for those from 256 on (as in GPT-2).
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


CHARACTERS = characters()
