"""A request on its way through the engine."""

from collections.abc import Mapping

import numpy as np

from omnifusion_jax.batch import FEATURE, SPECIAL, Sample, Tile
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.inference.answer import Answer, answer
from omnifusion_jax.inference.engine.features import names
from omnifusion_jax.inference.engine.handle import Progress
from omnifusion_jax.inference.options import Sizes, slots_of
from omnifusion_jax.inference.search import Texts

APART = np.uint64(0x9E3779B97F4A7C15)  # an odd number: its multiples tell the feature rows of a tile apart


class Task:
    """What the engine knows of a request: what it asks, and how far it has come."""

    def __init__(
        self,
        sample: Sample,
        generation: GenerationConfig,
        needs: Sizes,
        name: str | int,
        where: str,
        tiles: Mapping[str, Tile],
    ):
        """`name` is what random draws depend on, `where` what errors begin with; `tiles` are of the model."""
        self.sample, self.generation, self.needs = sample, generation, needs
        self.name, self.where = name, where
        self.tiles = {tiles[stream]: names(views) for stream, views in sample.media.items()}
        self.ids = identities(sample, self.tiles)
        self.end = len(sample.tokens) - 1  # columns of the prompt that are read before the answer begins
        self.slots = range(0)  # those that it is in
        self.rows = []  # and its rows in them
        self.read = 0  # columns of the prompt that are read
        self.columns = (
            None  # int32[3, length]: tokens, kind and index of the prompt, once its media have places
        )
        self.guides = []  # of each row, where the answer has a form
        self.progress = Progress()

    @property
    def count(self) -> int:
        """Slots that it takes."""
        return slots_of(self.generation)

    @property
    def length(self) -> int:
        """Positions of a slot that it takes; nothing is read after the last token."""
        return self.end + self.generation.max_new_tokens

    def sit(self, slot: int, beams: int):
        """Takes its slots, from `slot` on, which have rows for `beams` each."""
        self.slots = range(slot, slot + self.count)
        self.rows = [one * beams + beam for one in self.slots for beam in range(self.generation.num_beams)]

    def place(self, features: Mapping):
        """Makes its `columns`; feature rows are counted through all that `features`, by stream, keep."""
        tokens, kind, index, *_ = self.sample
        index = index.copy()
        for of, tile, number, row, here in feature_rows(self.sample, self.tiles):
            places = features[tile.number].place
            index[here] = np.array([places[name] for name in of], np.int32)[number] * tile.rows + row
        self.columns = np.stack([tokens, kind, index])

    def follow(self, report):
        """Moves its guides on by the tokens that a Report of `programs` tells."""
        before = dict(zip(self.rows, self.guides, strict=False))  # empty without a form
        self.guides = [
            before[int(report.parents[row])].after(int(report.last[row]))
            if report.length[row] > guide.length
            else guide
            for row, guide in before.items()
        ]

    def finish(self, texts: Texts, tokenizer: Tokenizer):
        """Makes the Answer of its finished texts, among those of all rows."""
        found = answer(self.generation, tokenizer, texts, self.rows)
        self.progress.tokens = found.tokens
        self.progress.answer = found

    def fail(self, why: str):
        """Makes the Answer an error, with the tokens that there are."""
        tokens = self.progress.tokens
        self.progress.answer = Answer("", tokens, "error", error=f"{self.where}: {why}")


def identities(sample: Sample, tiles: Mapping[Tile, list[bytes]]) -> np.ndarray:
    """int64[length]: numbers that are equal where the embeddings of two prompts are.

    `tiles` has the names of the tiles of each stream. Numbers of tokens are their ids, those of special
    vectors are negative and small; those of feature rows are so large that they do not meet by chance.
    """
    found = sample.tokens.astype(np.int64)
    special = sample.kind == SPECIAL
    found[special] = -1 - sample.index[special]
    for of, _, number, row, here in feature_rows(sample, tiles):
        hashes = np.frombuffer(b"".join(of), np.uint64)[number] + row.astype(np.uint64) * APART
        found[here] = hashes.view(np.int64)
    return found


def feature_rows(sample, tiles):
    """Yields (names, Tile, numbers of tiles, rows in them, here) of each stream; `here` says where."""
    for tile, of in tiles.items():
        here = sample.kind == FEATURE + tile.number
        yield of, tile, *np.divmod(sample.index[here], tile.rows), here


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many positions two prompts have in common at their beginning."""
    n = min(len(one), len(other))
    apart = np.flatnonzero(one[:n] != other[:n])
    return int(apart[0]) if len(apart) else n
