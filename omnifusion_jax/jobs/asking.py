"""Requests by their places become answers, as fast as the model takes them."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.inference.model import Answer, Model
from omnifusion_jax.jobs.ahead import ahead
from omnifusion_jax.jobs.progress import Progress
from omnifusion_jax.jobs.requests import Requests

WINDOW = 8  # batches of requests that are sorted by length before they are asked
PORTION = 8  # requests that are made ready at a time


@dataclasses.dataclass
class Asking:
    """What it takes to ask a model.

    `num_workers`: processes that read requests and decode pictures; with 0 threads of this process do.
    """

    model: Model
    requests: Requests
    generation: GenerationConfig
    batch_size: int
    num_workers: int
    progress: Progress

    @property
    def window(self) -> int:
        """How many requests are sorted by length, so that those of a batch need about the same room.

        While they are asked, as many are made ready: that much is in memory, however many there are in all.
        """
        return WINDOW * self.batch_size

    def answers(self, places: Iterable[int]) -> Iterator[tuple[int, str, Answer]]:
        """Yields (place, id, Answer) of the requests at `places`, as they are ready."""
        asked = {}  # {number of a question: (place, id)}
        with contextlib.closing(self.questions(places, asked)) as questions:
            for number, answer in self.model.each(questions, self.generation, batch_size=self.batch_size):
                yield *asked.pop(number), answer

    def questions(self, places, asked):
        """Yields what the model is asked, and notes in `asked` which request it is."""
        number, depth = itertools.count(), -(-self.window // PORTION)
        made = ahead(self.requests, portions(places, PORTION), self.num_workers, depth, self.requests.died)
        with contextlib.closing(made):
            while window := list(itertools.islice(made, self.window)):
                for place, line in sorted(window, key=lambda one: -one[1].length):
                    asked[next(number)] = place, line.name
                    self.progress.begin(line.unread)
                    yield line.question


def portions(places: Iterable[int], size: int) -> Iterator[list[int]]:
    """Lists of at most `size` places."""
    places = iter(places)
    while some := list(itertools.islice(places, size)):
        yield some


def in_order(answers: Iterable[tuple], places: Iterable[int]) -> Iterator[tuple]:
    """Yields tuples that begin with a place in the order of `places`, which has the same ones.

    Those that come too early are held back.
    """
    held = {}
    places = iter(places)
    following = next(places, None)
    for answer in answers:
        held[answer[0]] = answer
        while following in held:
            yield held.pop(following)
            following = next(places, None)
