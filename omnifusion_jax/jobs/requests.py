"""A source of data as requests to a model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from omnifusion_jax.data.dialogues import Dialogue, Request
from omnifusion_jax.data.layout import Layout, Prepare
from omnifusion_jax.data.sources import ENDLESS, Source, open_source
from omnifusion_jax.data.worker import WorkerEnded
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.prompts import Question, question


class Line(NamedTuple):
    """A request, read."""

    name: str
    question: Question | DataError
    unread: tuple[str, ...] = ()  # keys of the request that nothing reads

    @property
    def length(self) -> int:
        """Tokens that are read before the answer."""
        return 0 if isinstance(self.question, DataError) else len(self.question.sample.tokens)


@dataclasses.dataclass
class Requests:
    """The requests of a source by their place in it, from 0 on. It travels to worker processes.

    `new`: the most tokens that an answer may have.
    """

    source: Source
    prepare: Prepare
    new: int

    def __len__(self):
        return len(self.source)

    def number(self, place: int) -> str:
        """What a request without an id is called: the number of its line, or else of its place, from 1 on."""
        return str(self.source.line(place) if getattr(self.source, "by_line", False) else place + 1)

    def name(self, place: int) -> str:
        """The request's own id, or its number."""
        try:
            own = self.source.id(place) if hasattr(self.source, "id") else None
        except DataError:
            own = None
        return self.number(place) if own is None else str(own)

    def content(self, place: int) -> bytes:
        """What differs if a request was changed since it was answered, and the fingerprint has not told."""
        return self.source.text(place).strip() if hasattr(self.source, "text") else b""

    @property
    def fingerprint(self) -> str:
        """Of a source whose requests cannot be changed or added to one by one."""
        return "" if hasattr(self.source, "text") else getattr(self.source, "fingerprint", None) or ""

    def __call__(self, places: Sequence[int]) -> list[Line]:
        return list(map(self.line, places))

    def line(self, place: int) -> Line:
        """What is asked at a place, or why it cannot be asked."""
        name, where = self.name(place), self.source.where(place)
        try:
            dialogue = self.source[place]
            request = request_of(dialogue, name, self.prepare.layout)
            asked = Question(name, question(request, where, self.prepare, self.new))
            return Line(name, asked, dialogue.unread)
        except DataError as error:
            return Line(name, error)
        except Exception as error:  # whatever a request may hold, it stops no other
            return Line(name, DataError(f"{where}: {type(error).__name__}: {error}"))

    def died(self, place: int, error: WorkerEnded) -> Line:
        """Of a request at which the process that read it has ended."""
        return Line(self.name(place), DataError(f"{self.source.where(place)}: {error}"))


def open_requests(path: str | Path, images: str | Path, model, new: int) -> Requests:
    """The Requests at a path, which `data.sources` describes, for an inference.model.Model.

    Raises:
      DataError: the source does not exist, cannot be read or has no end.
    """
    source = open_source(str(path), str(images), model.config.image.encoders[0].side)
    if len(source) >= ENDLESS:
        raise DataError(f"{path} has no end: give a file of requests")
    return Requests(source, model.prepare, new)


def request_of(dialogue: Dialogue, name: str, layout: Layout) -> Request:
    """The Request that a Dialogue is; in LLaVA's form its last answer is the model's to give.

    Raises:
      DataError: the turns do not suit the layout.
    """
    messages = layout.messages(dialogue)
    if messages[-1]["role"] == "assistant" and dialogue.marked:
        messages.pop()
    return dialogue.request(messages, name)
