"""What a caller holds of a request that is being answered."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator

from omnifusion_jax.inference import streaming
from omnifusion_jax.inference.answer import Answer


@dataclasses.dataclass
class Progress:
    """What has become of a request so far."""

    tokens: list[int] = dataclasses.field(default_factory=list)  # as far as somebody listens
    answer: Answer | None = None  # once it is finished
    listening: bool = False  # somebody waits for the next token
    cancelled: bool = False


class Handle:
    """An answer on its way; any thread may wait for it.

    `for token in handle` gives its tokens as they are chosen, `handle.pieces()` its text, and
    `async for piece in handle` the same in an event loop. Of a search with beams they come at its end.
    """

    def __init__(self, progress: Progress, engine):
        self.progress, self.engine = progress, engine

    @property
    def done(self) -> bool:
        return self.progress.answer is not None

    def result(self) -> Answer:
        """Waits for the answer."""
        self.engine.work(lambda: self.done)
        return self.progress.answer

    def cancel(self):
        """Gives the answer up; it becomes an error, with the tokens that there are."""
        self.progress.cancelled = True
        self.engine.wake()

    def __iter__(self) -> Iterator[int]:
        """Yields the token ids of the answer. What goes wrong ends them: see `result`."""
        self.progress.listening, sent = True, 0
        while True:
            self.engine.work(lambda sent=sent: self.done or len(self.progress.tokens) > sent)
            ended, tokens = self.done, self.progress.tokens  # in this order: then all of them are there
            yield from tokens[sent:]
            sent = len(tokens)
            if ended:
                return

    def pieces(self) -> Iterator[str]:
        """Yields the text piece by piece; joined, the pieces are the text of the answer."""
        return streaming.pieces(self.engine.tokenizer, self)

    async def __aiter__(self) -> AsyncIterator[str]:
        pieces, end = self.pieces(), object()
        while (piece := await asyncio.to_thread(next, pieces, end)) is not end:
            yield piece
