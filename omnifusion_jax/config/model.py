"""The config of a model: streams of media, special vectors, a decoder."""

import dataclasses
import re
from collections.abc import Iterable

from omnifusion_jax.config.base import check, one_of
from omnifusion_jax.config.decoder import DecoderConfig
from omnifusion_jax.config.streams import ImageConfig, StreamConfig
from omnifusion_jax.tables import LAYOUTS


def part_of(path: str) -> str:
    """The part that a parameter belongs to: image/encoders/0 for image/encoders/0/patch/kernel.

    The factors of LoraConfig are a part of their own, lora, wherever they lie.
    """
    if path.endswith(("/lora_a", "/lora_b")):
        return "lora"
    return re.match(r"\w+/(encoders/\d+|adapter)(?=/)|\w+", path)[0]


def of_encoders(path: str, streams: Iterable[str]) -> bool:
    """Whether a parameter belongs to an encoder of one of these streams."""
    return any(path.startswith(f"{stream}/encoders/") for stream in streams)


@dataclasses.dataclass
class ModelConfig:
    """Streams turn media into token embeddings, and a decoder reads these among text.

    A new kind of media is a new StreamConfig here.
    """

    preset: str = "omnifusion-1.1"  # a row of PRESETS (docs/presets.md)
    # the preset that filled the fields below; when `preset` is changed, they are filled anew
    filled_from: str = "omnifusion-1.1"
    image: ImageConfig = dataclasses.field(default_factory=ImageConfig)
    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    layout: str = "omnifusion"  # how a dialogue becomes tokens; or original, text, template (docs/data.md)
    # where media stand: before the first turn; or "mark": where the text marks them.
    # The layouts "original" and "template" have places of their own
    image_place: str = "prefix"
    prompt: str = "This is a dialog with AI assistant.\n"  # text before the first turn
    user: str = "User:"  # layout "text": what marks the turns of the user
    bot: str = "AI:"  # layout "text": what marks the turns of the model
    template: str = ""  # layout "template": a chat template in Jinja, as Hugging Face has them
    # layout "template": what is learned; turn: all that the template writes from where the model begins to
    # speak to the end of its turn; or omnilmm, ends, minicpm (docs/data.md)
    labels: str = "turn"

    @property
    def streams(self) -> dict[str, StreamConfig]:
        """The streams of media by name."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, StreamConfig)}

    @property
    def special(self) -> tuple[str, ...]:
        """Names of the special vectors, in the order in which `Batch.index` counts them."""
        of_streams = tuple(name for stream in self.streams.values() for name in stream.special)
        return LAYOUTS[self.layout].vectors + of_streams

    @property
    def parts(self) -> dict:
        """The configs of the model's parts, by the path under which their parameters lie.

        The paths are image/encoders/0 and so on, image/adapter, special and decoder.
        """
        found = {}
        for name, stream in self.streams.items():
            found |= {f"{name}/encoders/{i}": encoder for i, encoder in enumerate(stream.encoders)}
            found[f"{name}/adapter"] = stream.adapter
        if self.special:
            found["special"] = self.special
        return found | {"decoder": self.decoder}

    def validate(self):
        self.decoder.validate()
        for stream in self.streams.values():
            stream.validate(self.decoder.width)
        LAYOUTS[self.layout]
        one_of("model.labels", self.labels, ("turn", "omnilmm", "ends", "minicpm"))
        check(
            self.labels == "turn" or self.layout == "template",
            f"model.labels={self.labels} belongs to model.layout=template",
        )
        one_of("model.image_place", self.image_place, ("prefix", "mark"))
        free = self.image_place == "prefix" or self.layout not in ("original", "template")
        check(free, f"model.image_place=mark: model.layout={self.layout} has a place of its own for pictures")
        check(
            bool(self.template) == (self.layout == "template"),
            "model.template belongs to model.layout=template, which needs one",
        )
