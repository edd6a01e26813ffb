"""What is noted of a record while training's own code prepares it: its dialogue, and its pictures."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from omnifusion_jax.batch import Sample
from omnifusion_jax.data.images import open_image
from omnifusion_jax.data.layout import ANSWER, Layout
from omnifusion_jax.data.mixture import Member, PrepareEach
from omnifusion_jax.data.modality import Prepared
from omnifusion_jax.data.pictures import ImageProcessor, SliceProcessor


class Picture(NamedTuple):
    """A picture as it was decoded."""

    width: int
    height: int
    tiles: int
    hash: int  # of 64 bits, see `difference_hash`


def difference_hash(picture: Image.Image) -> int:
    """64 bits that copies of a picture share though they were scaled or compressed: its dHash.

    The picture is shrunk to 9 x 8 grey pixels. A bit says whether a pixel is brighter than its left
    neighbour. All pictures of one colour have the hash 0.
    """
    grey = np.asarray(picture.resize((9, 8), Image.Resampling.BOX).convert("L"))
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes())


@dataclasses.dataclass
class WatchedPictures:
    """A processor of pictures that notes in `seen` what it decodes, once."""

    processor: ImageProcessor | SliceProcessor
    seen: list[Picture]

    def __call__(self, source) -> Prepared:
        picture = open_image(source, max_pixels=self.processor.max_pixels)
        prepared = self.processor(picture)
        self.seen.append(Picture(*picture.size, len(prepared.views[0]), difference_hash(picture)))
        return prepared


class Watched:
    """A PrepareEach that notes the `member` of the mixture that it was last given, and its `pictures`."""

    def __init__(self, prepare: PrepareEach):
        self.pictures, self.member, self.each = [], None, []
        for one in prepare.each:
            watched = {
                stream: WatchedPictures(processor, self.pictures)
                if isinstance(processor, ImageProcessor | SliceProcessor)
                else processor
                for stream, processor in one.processors.items()
            }
            self.each.append(dataclasses.replace(one, processors=watched))

    def __call__(self, member: Member) -> Sample:
        self.member = member
        self.pictures.clear()
        return self.each[member.number](member.dialogue)

    @property
    def layout(self) -> Layout:
        """That of the member."""
        return self.each[self.member.number].layout

    def answers(self) -> Iterator[str]:
        """The answers in the dialogue, as its layout reads it."""
        return (text for role, text in self.layout.read(self.member.dialogue) if role == ANSWER)
