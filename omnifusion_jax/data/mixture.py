"""Several sets of data as one, each read in its own way."""

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from omnifusion_jax.batch import Sample, Tile
from omnifusion_jax.config import DataConfig, ModelConfig, SetConfig
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.order import Share
from omnifusion_jax.data.sources import ENDLESS, Source, open_source
from omnifusion_jax.data.sources.array_record import MANIFEST, read_manifest
from omnifusion_jax.errors import ConfigError, DataError


class Member(NamedTuple):
    """A dialogue of a mixture."""

    number: int  # of its set
    dialogue: Dialogue


class Mixture:
    """The records of several sources, one source after the other.

    The `fingerprint` of one source alone is its own. `made_by` says what made features
    of the media of all sources, and is None where they are files.
    """

    def __init__(self, sources: dict[str, Source]):
        self.names, self.sources = list(sources), list(sources.values())
        self.first = [0, *itertools.accumulate(map(len, self.sources))]
        prints = [getattr(source, "fingerprint", None) for source in self.sources]
        self.fingerprint = prints[0]
        self.made_by = getattr(self.sources[0], "made_by", None)
        if len(prints) > 1:
            self.fingerprint = hashlib.blake2b(repr(prints).encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self.first[-1]

    def __getitem__(self, i: int) -> Member:
        number, record = self.locate(i)
        return Member(number, self.sources[number][record])

    def locate(self, i: int) -> tuple[int, int]:
        """(the number of its set, the index within the set) of a record."""
        number = bisect.bisect_right(self.first, i) - 1
        return number, i - self.first[number]

    def where(self, i: int) -> str:
        """The place of a record, for messages."""
        number, record = self.locate(i)
        source = self.sources[number]
        place = source.where(record) if hasattr(source, "where") else f"record {record}"
        return f"{self.names[number]}: {place}" if len(self.names) > 1 else place


@dataclasses.dataclass
class PrepareEach:
    """The `Prepare` of each set of a mixture, as one."""

    each: Sequence[Prepare]

    def __call__(self, member: Member) -> Sample:
        return self.each[member.number](member.dialogue)

    @property
    def layout(self):
        """That of the first set; vectors and streams are those of the model in all."""
        return self.each[0].layout

    @property
    def tiles(self) -> dict[str, Tile]:
        return self.each[0].tiles

    @property
    def room(self) -> int:
        """The largest number of tiles of a media item."""
        return max(processor.room for processor in self.each[0].processors.values())

    def outlined(self) -> "PrepareEach":
        """As Prepare.outlined."""
        return PrepareEach([prepare.outlined() for prepare in self.each])


def open_mixture(c: DataConfig, side: int) -> Mixture:
    """Opens `data.path` or `data.sets`.

    Raises:
      DataError: sets are missing or cannot be read, all of them, with where they come from.
    """
    sources, problems = {}, []
    for one in sets(c):
        try:
            sources[one.name] = open_source(one.path, one.images, side, features=True)
        except DataError as error:
            if c.path:
                raise
            hint = f"\n    It comes from {one.get}" if one.get else ""
            problems.append(f"\n  {one.name}: {error}{hint}")
    if problems:
        raise DataError(f"{len(problems)} of {len(c.sets)} sets of data cannot be read:{''.join(problems)}")
    made = {name: getattr(source, "made_by", None) for name, source in sources.items()}
    if odd := [name for name, features in made.items() if features != next(iter(made.values()))]:
        raise DataError(
            f"data.sets: {odd[0]} and {next(iter(made))} hold features of different encoders, or one of them "
            "none. Prepare all sets, those of mere text too, with the same --features"
        )
    return Mixture(sources)


def declared_features(c: DataConfig) -> dict | None:
    """What made features of the media of a run, if its data are there and say so; no record is looked for.

    Raises: DataError when a dataset.json cannot be read.
    """
    folders = [Path(one.path.removeprefix("array_record:")) for one in sets(c) if one.path]
    found = [read_manifest(folder) for folder in folders if (folder / MANIFEST).is_file()]
    return found[0]["made_from"].get("features") if found else None


def sets(c: DataConfig) -> tuple[SetConfig, ...]:
    """The sets of a mixture; `data.path` is one alone."""
    return c.sets or (SetConfig(name="data", path=c.path, images=c.images),)


def prepare_each(
    c: DataConfig, model: ModelConfig, tokenizer, features=None, pairs: bool = False
) -> PrepareEach:
    """What lays out the dialogues of each set; `features` and `pairs` as in Prepare.

    Raises ConfigError for a layout that the model cannot have.
    """
    found = []
    for one in sets(c):
        own = {name: getattr(one, name) for name in ("layout", "prompt") if getattr(one, name) is not None}
        config = dataclasses.replace(model, **own)
        settings = {"vectors": model.special, "max_pixels": c.max_pixels, "draft": c.draft}
        settings |= {"cut": c.on_long == "cut", "features": features, "pairs": pairs}
        found.append(Prepare.of(tokenizer, config, c.max_length, **settings))
    return PrepareEach(found)


def shares(c: DataConfig, mixture: Mixture) -> list[Share]:
    """What each set gives to an epoch.

    Raises:
      ConfigError: a set without an end stands beside others and does not say how many samples it gives.
    """
    found = sets(c)
    lengths = list(map(len, mixture.sources))
    for one, length in zip(found, lengths, strict=True):
        if len(found) > 1 and length >= ENDLESS and not one.samples:
            raise ConfigError(f"data.sets: {one.name} has no end. Give samples, how many an epoch takes")
    weight = sum(one.weight for one in found)
    counted = []
    for one, length in zip(found, lengths, strict=True):
        whole = sum(lengths) * one.weight / weight if weight else length * one.repeats
        counted.append(Share(length, one.samples or max(1, round(whole))))
    return counted
