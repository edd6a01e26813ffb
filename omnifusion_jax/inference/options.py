"""What a GenerationConfig asks for, as data of the rows that answer a request.

Every option is an array with a row for each row of the batch, so requests with different options share one
compiled program. Only capacities are compiled in: see `Sizes`.
"""

import dataclasses
import hashlib
from typing import NamedTuple, Self

import jax
import numpy as np

from omnifusion_jax.config import GenerationConfig, check
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.stops import stopped, stops

ANY = -1  # fills a banned sequence on the left: matches any token, and also the absence of one
NONE = -1  # no token: fills lists of tokens
WORD = 32  # tokens of a word of a packed mask
ALL = np.uint32(2**WORD - 1)  # a word that allows all of its tokens
# Values of `Options.early`, beside 0: when as many beams have finished as there are, or when none can become
# better at any length. With 0, none could become better at its present length.
IF_FULL, NEVER_EARLY = 1, 2
LISTS = ("ends", "bans", "ban_length", "stop_kinds", "stop_states", "likeliest")  # of Sizes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Capacities of the programs that choose tokens: all that is compiled in."""

    vocab: int  # scores of a row
    room: int  # tokens of an answer
    beams: int = 1  # of the widest search; with 1 no search is compiled
    ends: int = 2  # end tokens of a row
    bans: int = 8  # banned sequences of a row
    ban_length: int = 4  # tokens of a banned sequence
    stop_kinds: int = 0  # kinds of tokens that stop strings tell apart; with 0 none are looked for
    stop_states: int = 0  # how far stop strings may have come
    likeliest: int = 0  # likeliest tokens that are kept of each step

    @property
    def words(self) -> int:
        """Words of a packed mask over the vocabulary."""
        return -(-self.vocab // WORD)

    def join(self, other: Self) -> Self:
        """The larger capacity of each kind."""
        ours, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return Sizes(**{name: max(ours[name], theirs[name]) for name in ours})


class Options(NamedTuple):
    """What rows ask for. A search with beams takes `beams` rows, one after the other; all others take one."""

    limit: jax.Array  # int32[rows]: largest number of tokens
    least: jax.Array  # int32[rows]: smallest number of tokens before an end token
    beams: jax.Array  # int32[rows]: rows of the search
    rank: jax.Array  # int32[rows]: the place of the row in its search
    early: jax.Array  # int32[rows]: 0, IF_FULL or NEVER_EARLY
    norm: jax.Array  # float32[rows, room]: what the score of a beam with 1, 2, 3... tokens is divided by
    temperature: jax.Array  # float32[rows]; 0: the likeliest token
    top_k: jax.Array  # int32[rows]; 0: all
    rest: jax.Array  # float32[rows]: 1 - top_p
    min_p: jax.Array  # float32[rows]
    seed: jax.Array  # uint32[rows]
    name: jax.Array  # uint32[rows, 2]: stands for the request in random draws
    penalty: jax.Array  # float32[rows]: repetition penalty
    ngram: jax.Array  # int32[rows]: n of n-grams that are not repeated; 0: off
    first: jax.Array  # int32[rows]: the first token, or NONE
    last: jax.Array  # int32[rows]: the token at the limit, or NONE
    ends: jax.Array  # int32[rows, ends], filled with NONE
    # int32[rows, bans, ban_length], filled with ANY on the left; no ban where the last is NONE
    bans: jax.Array
    stop_kind: jax.Array  # int16[rows, vocab, or nothing where no stop strings are compiled in]; see stops.py
    stop_move: jax.Array  # int16[rows, stop_kinds, stop_states]
    likeliest: jax.Array  # int32[rows]: how many of the likeliest tokens are asked for
    suppressed: jax.Array  # uint32[rows, words]: packed mask of tokens that are never chosen
    suppressed_first: jax.Array  # uint32[rows, words]: that do not begin the answer
    allowed: jax.Array  # uint32[rows, words]: the only tokens that may come next


def blank(rows: int, sizes: Sizes) -> Options:
    """NumPy Options of rows that ask for nothing."""
    masks = np.zeros((2, rows, sizes.words), np.uint32)
    counts = np.zeros((6, rows), np.int32)
    return Options(
        limit=counts[0],
        least=counts[1],
        beams=np.ones(rows, np.int32),
        rank=counts[2],
        early=counts[3],
        norm=np.ones((rows, sizes.room), np.float32),
        temperature=np.zeros(rows, np.float32),
        top_k=counts[4],
        rest=np.zeros(rows, np.float32),
        min_p=np.zeros(rows, np.float32),
        seed=np.zeros(rows, np.uint32),
        name=np.zeros((rows, 2), np.uint32),
        penalty=np.ones(rows, np.float32),
        ngram=np.zeros(rows, np.int32),
        first=np.full(rows, NONE, np.int32),
        last=np.full(rows, NONE, np.int32),
        ends=np.full((rows, sizes.ends), NONE, np.int32),
        bans=np.full((rows, sizes.bans, sizes.ban_length), ANY, np.int32),
        stop_kind=np.zeros((rows, sizes.vocab if sizes.stop_kinds else 0), np.int16),
        stop_move=np.zeros((rows, sizes.stop_kinds, sizes.stop_states), np.int16),
        likeliest=counts[5],
        suppressed=masks[0],
        suppressed_first=masks[1],
        allowed=np.full((rows, sizes.words), ALL, np.uint32),
    )


def options(g: GenerationConfig, tokenizer: Tokenizer, sizes: Sizes, name: str | int = 0) -> Options:
    """NumPy Options of the rows that answer one request.

    `name` is the id of the request, or its place in a list: random draws depend on it and on the seed.
    `rest` and `norm` are computed in double precision, as Python code would, and then rounded.

    Raises:
      ConfigError: something that is asked for does not fit `sizes`, or see `needs`.
    """
    need = dataclasses.asdict(needs(g, tokenizer, sizes.vocab))
    for kind, size in dataclasses.asdict(sizes).items():
        check(need[kind] <= size, f"generation needs {kind} {need[kind]}, but there is room for {size}")
    count = rows_of(g)
    found = blank(count, sizes)
    found.limit[:], found.least[:] = g.max_new_tokens, g.min_new_tokens
    found.beams[:], found.rank[:] = g.num_beams, np.arange(count) % g.num_beams
    found.early[:] = early(g)
    found.norm[:] = np.arange(1.0, sizes.room + 1) ** g.length_penalty
    found.temperature[:], found.top_k[:] = g.temperature, g.top_k
    found.rest[:], found.min_p[:] = 1 - g.top_p, g.min_p
    found.seed[:], found.name[:] = g.seed, [words(name, row) for row in range(count)]
    found.penalty[:], found.ngram[:] = g.repetition_penalty, g.no_repeat_ngram_size
    found.first[:] = NONE if g.forced_bos_token_id is None else g.forced_bos_token_id
    found.last[:] = NONE if last_token(g, tokenizer) is None else last_token(g, tokenizer)
    ends = end_tokens(g, tokenizer)
    found.ends[:, : len(ends)] = ends
    for i, ids in enumerate(bans(g, tokenizer, sizes.vocab)):
        found.bans[:, i, -len(ids) :] = ids
    if g.stop_strings:
        kind, move = stops(tokenizer, sizes.vocab, g.stop_strings)
        found.stop_kind[:], found.stop_move[:, : move.shape[0], : move.shape[1]] = kind, move
    found.likeliest[:] = g.likeliest
    found.suppressed[:] = packed(g.suppress_tokens, sizes.vocab)
    found.suppressed_first[:] = packed(g.begin_suppress_tokens, sizes.vocab)
    return found


def needs(g: GenerationConfig, tokenizer: Tokenizer, vocab: int) -> Sizes:
    """The smallest Sizes that a GenerationConfig fits.

    Raises:
      ConfigError: a banned sequence is empty, a token is outside of `vocab`, more tokens are asked for than
        there are, or see `stops`.
    """
    check(g.likeliest <= vocab, f"generation.likeliest is {g.likeliest}, but there are {vocab} tokens only")
    named = {
        "stop_token_ids": g.stop_token_ids,
        "suppress_tokens": g.suppress_tokens,
        "begin_suppress_tokens": g.begin_suppress_tokens,
        "forced_bos_token_id": () if g.forced_bos_token_id is None else (g.forced_bos_token_id,),
        "forced_eos_token_id": () if g.forced_eos_token_id is None else (g.forced_eos_token_id,),
    }
    for field, ids in named.items():
        check_tokens(field, ids, vocab)
    banned = bans(g, tokenizer, vocab)
    kinds, states = stops(tokenizer, vocab, g.stop_strings).move.shape if g.stop_strings else (0, 0)
    return Sizes(
        vocab=vocab,
        room=g.max_new_tokens,
        beams=g.num_beams,
        ends=len(end_tokens(g, tokenizer)),
        bans=len(banned),
        ban_length=max(map(len, banned), default=0),
        stop_kinds=kinds,
        stop_states=states,
        likeliest=g.likeliest,
    )


def rounded(sizes: Sizes) -> Sizes:
    """Sizes whose lists are rounded up to powers of two, so that few programs serve many requests."""
    lists = {name: n for name, n in dataclasses.asdict(sizes).items() if name in LISTS}
    return dataclasses.replace(sizes, **{name: 1 << (n - 1).bit_length() for name, n in lists.items() if n})


def check_tokens(what, ids, vocab):
    check(
        all(0 <= i < vocab for i in ids),
        f"generation.{what} has tokens {list(ids)}, but the model knows 0 to {vocab - 1} only",
    )


def bans(g: GenerationConfig, tokenizer: Tokenizer, vocab: int) -> list[tuple[int, ...]]:
    """The banned sequences of a GenerationConfig.

    Banned strings are tokenized as in the published recipe, `tokenizer(word, add_special_tokens=False)`. A
    ban on an end token alone is ignored, as in Hugging Face.

    Raises:
      ConfigError: a banned sequence is empty or has a token outside of `vocab`.
    """
    named = [(f"banned {word!r}", tuple(tokenizer.encode(word))) for word in g.banned]
    named += [(f"banned_tokens {list(ids)}", tuple(ids)) for ids in g.banned_tokens]
    if g.ban_newline:
        named.append(("ban_newline", tuple(tokenizer.encode("\n")[-1:])))
    for what, ids in named:
        check(len(ids) > 0, f"generation.{what} is no token at all")
        check_tokens(what, ids, vocab)
    alone = {(end,) for end in end_tokens(g, tokenizer)}
    return list(dict.fromkeys(ids for _, ids in named if ids not in alone))


def end_tokens(g: GenerationConfig, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer."""
    return list(dict.fromkeys((tokenizer.eos, *g.stop_token_ids)))


def early(g: GenerationConfig) -> int:
    """The value of `Options.early`. Without a reward for length nothing grows better by growing longer."""
    if g.early_stopping == "never":
        return NEVER_EARLY if g.length_penalty > 0 else 0
    return IF_FULL if g.early_stopping else 0


def last_token(g: GenerationConfig, tokenizer: Tokenizer) -> int | None:
    """The token that stands at the limit whatever the model says, if there is one."""
    return tokenizer.eos if g.forced_eos else g.forced_eos_token_id


def rows_of(g: GenerationConfig) -> int:
    """How many rows answer a request."""
    return g.num_beams * slots_of(g)


def slots_of(g: GenerationConfig) -> int:
    """How many slots answer a request: each draw is in one of its own, and the beams of a search in one."""
    return 1 if g.num_beams > 1 else g.num_return_sequences


def reason(g: GenerationConfig, tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Why a finished answer ended: "stop", or "length" if the limit did, also by a forced token."""
    if len(tokens) < g.max_new_tokens or stopped(tokenizer, g.stop_strings, tokens):
        return "stop"
    forced = last_token(g, tokenizer) is not None
    return "stop" if tokens[-1] in end_tokens(g, tokenizer) and not forced else "length"


def packed(tokens, vocab) -> np.ndarray:
    """A packed mask uint32[words] of some tokens: bit t % WORD of word t // WORD stands for token t."""
    mask = np.zeros(-(-vocab // WORD) * WORD, np.uint8)
    mask[list(tokens)] = 1
    return np.packbits(mask, bitorder="little").view("<u4")


def words(name: str | int, rank: int = 0) -> np.ndarray:
    """Two words, uint32[2], that stand for a row of a request in its random keys.

    They are a hash of the request's id (a string), or of its place in a list (a number) if it has no id.
    """
    told = f"{type(name).__name__}:{name}" + (f"#{rank}" if rank else "")
    digest = hashlib.sha256(told.encode(errors="surrogatepass")).digest()
    return np.frombuffer(digest[:8], "<u4")


def write(table: Options, rows, found: Options):
    """Puts the Options of a request into a NumPy table of many rows, in place, at its own `rows`."""
    for all_rows, new in zip(table, found, strict=True):
        all_rows[rows] = new
