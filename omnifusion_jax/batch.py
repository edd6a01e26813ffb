"""The one structure that crosses from data to models. NumPy only: neither side needs the other."""

from typing import NamedTuple

import numpy as np

PADDING, TEXT, FEATURE, SPECIAL = range(4)  # kinds of position


class Sample(NamedTuple):
    """One laid-out dialogue; arrays of one length."""

    tokens: np.ndarray  # int32: token ids, the padding id where no text stands
    kind: np.ndarray  # int32: TEXT, FEATURE or SPECIAL
    index: np.ndarray  # int32: which feature row, or which of ModelConfig.special stands here; 0 for text
    weights: np.ndarray  # float32: the loss weight of this token as a target of the position before it
    images: tuple[np.ndarray, ...]  # for each of ModelConfig.views uint8[tiles, size, size, 3]; feature rows are counted through them
    slots: int = 0  # positions that pictures take, newline vectors included


class Batch(NamedTuple):
    """Laid-out dialogues of one static shape. Where a sample has fewer tiles than there is room for, blank ones follow that no position points to."""

    tokens: np.ndarray  # int32[batch, seq]
    kind: np.ndarray  # int32[batch, seq]; PADDING at the end (in generation: at the start) of a row
    index: np.ndarray  # int32[batch, seq]
    weights: np.ndarray  # float32[batch, seq]
    segments: np.ndarray  # int32[batch, seq]; 0 is padding, attention stays within a segment
    positions: np.ndarray  # int32[batch, seq], counted from 0 in each segment
    images: tuple[np.ndarray, ...]  # for each view uint8[batch, tiles, size, size, 3]


def collate(samples, length, tiles, sizes, left=False):
    """Pads samples to `length` tokens, and `tiles` tiles of `sizes` pixels, a size a view; on the left for generation: all rows end together."""
    batch = Batch(
        *(np.zeros((len(samples), length), t) for t in (np.int32, np.int32, np.int32, np.float32, np.int32, np.int32)),
        tuple(np.zeros((len(samples), tiles, size, size, 3), np.uint8) for size in sizes),
    )
    for row, sample in enumerate(samples):
        n = len(sample.tokens)
        here = np.s_[row, length - n :] if left else np.s_[row, :n]
        for name in ("tokens", "kind", "index", "weights"):
            getattr(batch, name)[here] = getattr(sample, name)
        batch.segments[here] = 1
        batch.positions[here] = np.arange(n)
        for room, images in zip(batch.images, sample.images, strict=False):
            room[row, : len(images)] = images
    return batch
