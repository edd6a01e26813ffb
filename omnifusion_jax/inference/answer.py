"""What comes of a request."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the model, or the error that prevented it."""

    text: str = ""
    # exactly the generated tokens, with the end-of-sequence token if it was generated
    tokens: list[int] = dataclasses.field(default_factory=list)
    # "stop": the model ended the answer; "length": the limit did, also by a forced end of sequence; "error"
    finish_reason: str = "stop"
    # sum of the tokens' log probabilities under the model's distribution, before any logits processor
    logprob: float = 0.0
    error: str | None = None
