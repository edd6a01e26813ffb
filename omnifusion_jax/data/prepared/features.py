"""Writes shards of features: threads prepare media, and this process, which has the devices, encodes them.

An item's features take several times the bytes of its file. What is held at a time are those of one portion
of the records, and the prepared media of the next.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.data.features import FeatureProcessor, Features
from omnifusion_jax.data.modality import Prepared
from omnifusion_jax.data.prepared.shards import Report, Shards
from omnifusion_jax.data.sources.array_record import packed
from omnifusion_jax.errors import DataError, OmniFusionError


@dataclasses.dataclass
class FeatureShards(Shards):
    """Writes shards whose media are features.

    Args:
      processors: {stream: FeatureProcessor}.
      encode: {stream: function of views (array [tiles, ...] for each) to features ([tiles, rows, width] of
        each encoder)}.
      portion: records that are encoded together.
    """

    processors: dict[str, FeatureProcessor]
    encode: dict[str, Callable[[tuple[np.ndarray, ...]], Sequence[np.ndarray]]]
    portion: int

    def read(self, numbers: range) -> Iterator[tuple[int, Dialogue | DataError]]:
        following = range(numbers.stop, min(numbers.stop + self.portion, self.plan.records))
        self.asked = {i: future for i, future in self.asked.items() if i in numbers}
        for i in (*numbers, *following):
            if i not in self.asked:
                self.asked[i] = self.pool.submit(self.prepared, i)
        found = [self.asked[i].result() for i in numbers]
        used = [one for one in found if not isinstance(one, DataError)]
        features = {stream: iter(self.features(stream, used)) for stream in self.encode}
        for i, one in zip(numbers, found, strict=True):
            if isinstance(one, DataError):
                yield i, one
                continue
            dialogue, _ = one
            media = tuple(Media(stream, next(features[stream])) for stream, _ in dialogue.media)
            yield i, dataclasses.replace(dialogue, media=media)

    def prepared(self, i: int) -> tuple[Dialogue, list[Prepared]] | DataError:
        """Record `i` with its media prepared for the encoders, or why it cannot be used."""
        try:
            dialogue = self.source[i]
        except DataError as error:
            return error
        try:
            return dialogue, [self.processor(stream).like(source) for stream, source in dialogue.media]
        except DataError as error:
            return error.at(dialogue.where)

    def processor(self, stream):
        if stream not in self.processors:
            raise DataError(f"the model takes no media of the kind {stream!r}", "media")
        return self.processors[stream]

    def features(self, stream, records) -> list[Features]:
        """The features of the media of a stream, in the order of the records."""
        items = [
            prepared
            for dialogue, of_record in records
            for media, prepared in zip(dialogue.media, of_record, strict=True)
            if media.stream == stream
        ]
        if not items:
            return []
        views = tuple(map(np.concatenate, zip(*(one.views for one in items), strict=True)))
        ends = np.cumsum([len(one.views[0]) for one in items])[:-1]
        of_items = zip(*(np.split(a, ends) for a in self.encode[stream](views)), strict=True)
        return [Features.of(one.order, arrays) for one, arrays in zip(items, of_items, strict=True)]

    def made(
        self, numbers: Sequence[int], workers: int, advance: Callable[[int], Any]
    ) -> Iterator[tuple[int, Report]]:
        """As `shards.made`, in this process; `workers` are threads."""
        self.asked, self.pool = {}, concurrent.futures.ThreadPoolExecutor(workers)
        try:
            for shard in numbers:
                records = self.plan.range(shard)
                for start in records[:: self.portion]:
                    stop = min(start + self.portion, records.stop)
                    result = self((shard, start, stop))
                    if isinstance(result, OmniFusionError):
                        raise result
                    advance(stop - start)
                yield shard, result
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)


def record_bytes(processors: dict[str, FeatureProcessor], dialogue: Dialogue) -> int:
    """Bytes of a dialogue's record, from the headers of its media. Raises DataError."""
    size = len(packed(dataclasses.replace(dialogue, media=())))
    for stream, source in dialogue.media:
        if stream in processors:
            size += len(processors[stream].like.outline(source).views[0]) * processors[stream].tile_bytes()
    return size
