"""What comes of a request."""

import dataclasses
from collections.abc import Sequence
from typing import Self

import numpy as np

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.options import reason
from omnifusion_jax.inference.search import Texts


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the model, or the error that prevented it.

    Log probabilities are natural, and by the model's own distribution, before any logits processor.
    """

    text: str = ""
    # exactly the generated tokens, with the end-of-sequence token if it was generated
    tokens: list[int] = dataclasses.field(default_factory=list)
    # "stop": an end token or a stop string ended the answer; "length": the limit did, also by a forced end of
    # sequence; "error"
    finish_reason: str = "stop"
    logprob: float = 0.0  # sum of the tokens' log probabilities
    error: str | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)  # of each token
    # of each step the `likeliest` tokens that were asked for, as pairs (token, log probability), best first
    likeliest: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    # with `num_return_sequences` the answers beside this one: the next best beams, or further draws
    others: list[Self] = dataclasses.field(default_factory=list)


def answer(g: GenerationConfig, tokenizer: Tokenizer, texts: Texts, rows: Sequence[int]) -> Answer:
    """The Answer of the finished `texts` (NumPy arrays) of a request that has these `rows`."""
    # A search may end with fewer finished texts than it has beams.
    some = [row for row in rows[: g.num_return_sequences] if texts.length[row] > 0]
    first, *others = [one(g, tokenizer, texts, row) for row in some]
    return dataclasses.replace(first, others=others)


def one(g: GenerationConfig, tokenizer: Tokenizer, texts: Texts, row: int) -> Answer:
    """The Answer in one row."""
    n = int(texts.length[row])
    tokens, logprobs = texts.tokens[row, :n].tolist(), texts.logprobs[row, :n]
    likeliest = zip(*(a[row, :n, : g.likeliest].tolist() for a in texts.likeliest), strict=True)
    return Answer(
        text=tokenizer.decode(tokens),
        tokens=tokens,
        finish_reason=reason(g, tokenizer, tokens),
        logprob=float(np.sum(logprobs, dtype=np.float64)),
        logprobs=logprobs.tolist(),
        likeliest=[list(zip(*pair, strict=True)) for pair in likeliest] if g.likeliest else [],
    )
