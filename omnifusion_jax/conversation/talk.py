"""What was said and shown so far, and what of it still fits the model."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from PIL import Image

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.images import open_image
from omnifusion_jax.errors import DataError


class Shown(NamedTuple):
    """A picture that the user showed."""

    file: Path  # absolute
    image: Image.Image

    @classmethod
    def of(cls, name: str) -> Self:
        """The picture in the named file; ~ is the user's home. Raises DataError."""
        name = os.path.abspath(os.path.expanduser(name))
        return cls(Path(name), open_image(name))


class Turn(NamedTuple):
    """A question, the pictures that were shown with it, and what the model answered."""

    pictures: tuple[Shown, ...]
    question: str
    answer: str = ""


class Past(NamedTuple):
    """All that the model is reminded of with the next question."""

    turns: tuple[Turn, ...] = ()
    waiting: tuple[Shown, ...] = ()  # pictures that are shown with the next question

    @property
    def pictures(self) -> tuple[Shown, ...]:
        return (*(shown for turn in self.turns for shown in turn.pictures), *self.waiting)

    def shorter(self) -> Iterator[Self]:
        """Yields ever less of it, from all to nothing but the pictures that are waiting.

        Turns leave first, the oldest before the others, and the next question takes over their pictures:
        the talk is about them. Then those pictures leave too.
        """
        for gone in range(len(self.turns) + 1):
            inherited = Past(self.turns[:gone]).pictures
            rest = self.turns[gone:]
            if rest:
                first = rest[0]._replace(pictures=(*inherited, *rest[0].pictures))
                yield Past((first, *rest[1:]), self.waiting)
            else:
                yield Past((), (*inherited, *self.waiting))
        for gone in range(1, len(inherited) + 1):
            yield Past((), (*inherited[gone:], *self.waiting))

    def messages(self, source: Callable[[Shown], object]) -> list[dict]:
        """The turns as messages of a Request; `source` makes what stands there for a picture."""
        found = []
        for turn in self.turns:
            parts = [{"type": "image", "image": source(shown)} for shown in turn.pictures]
            content = [*parts, {"type": "text", "text": turn.question}] if parts else turn.question
            found.append({"role": "user", "content": content})
            found.append({"role": "assistant", "content": turn.answer})
        return found


class Talk:
    """A conversation with a model.

    Attributes:
      past: what was said and shown so far.
      generation: how answers are drawn.
    """

    def __init__(self, model, generation: GenerationConfig, waiting: Iterable[Shown] = ()):
        self.model, self.generation, self.past = model, generation, Past((), tuple(waiting))

    def show(self, shown: Shown) -> None:
        """Shows a picture with the next question."""
        self.past = self.past._replace(waiting=(*self.past.waiting, shown))

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer to a question piece by piece; all at once if beams are searched.

        What no longer fits the model is left out of `past`, which stays as it is if the question cannot be
        answered at all.

        Raises (when called, before anything is yielded):
          DataError: the question or a picture cannot be used.
          ConfigError: `generation` does not fit the model.
        """
        too_long = None
        for past in self.past.shorter():
            asked = Past((*past.turns, Turn(past.waiting, question))).messages(lambda shown: shown.image)[:-1]
            try:
                pieces = self.pieces(Request(asked))
            except DataError as error:
                if error.reason != "too_long":
                    raise
                too_long = too_long or error  # of the whole talk
                continue
            self.past = past
            return pieces
        raise too_long

    def pieces(self, request):
        if self.generation.num_beams == 1:
            return self.model.stream(request, self.generation)
        # the best beam is known only at the end
        answers = self.model.generate([request], self.generation)
        return (answer.text for answer in answers)

    def keep(self, question: str, answer: str) -> None:
        """Remembers a question that was asked, with its answer or what there is of it."""
        self.past = Past((*self.past.turns, Turn(self.past.waiting, question, answer)))

    def undo(self) -> bool:
        """Takes back what came last, a picture that waits or a turn, whose pictures wait again.

        Returns whether there was anything to take back.
        """
        turns, waiting = self.past
        if waiting:
            self.past = Past(turns, waiting[:-1])
        elif turns:
            self.past = Past(turns[:-1], turns[-1].pictures)
        return bool(turns or waiting)

    def reset(self) -> None:
        """Forgets all that was said and shown."""
        self.past = Past()
