"""`OmniLMMChat`, the interface of the original: a picture in base64, a dialogue in JSON."""

import base64
import json

from omnifusion_jax.api import load
from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.images import open_image
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.model import Model

NO_PICTURE = "Image decode error"  # the answer of the original to bytes that are no picture
DEFAULTS = {  # what the original answers with, by the token that stands for features and the fit of pictures
    ("<im_patch>", "squash"): "omnilmm-12b",
    ("<unk>", "squash"): "minicpm-v-1.0",
    ("<unk>", "slices"): "minicpm-v-2.0",
}
NAMES = {"from": "role", "value": "content"}  # the other names that the original knows for parts of a turn


class OmniLMMChat:
    """Answers as the original class of this name does, which later became `MiniCPMVChat`."""

    def __init__(self, model, generation: GenerationConfig | None = None, **options):
        """Takes a model.

        Args:
          model: a Model, or what `load` takes, with its `options`.
          generation: how answers are drawn; None: as the original draws them for this model.
        """
        self.model = model if isinstance(model, Model) else load(model, **options)
        image = self.model.config.image
        name = DEFAULTS.get((image.token, image.fit), "omnilmm-12b")
        self.generation = generation or GenerationConfig.named(name)

    def chat(self, given: dict) -> str:
        """The answer to {"image": a file in base64, "question": the dialogue so far as JSON}.

        The dialogue is a list of {"role": "user", "content": "..."} and of the assistant's turns, or of
        {"from": "human", "value": "..."} and of the other's. The base64 may be broken into lines. `<image>`
        in the text marks where the picture stands; without a mark it stands before the first question.
        Without an image, or with an empty one, the model is asked about the text alone.

        Bytes that are no picture have the answer "Image decode error".

        Raises:
          DataError: the question is no JSON, or the dialogue cannot be laid out.
        """
        image, pictures = given.get("image"), []
        try:
            if image:
                pictures.append(open_image(base64.b64decode(image)))  # lines too, as the original
        except (DataError, ValueError, TypeError):
            return NO_PICTURE
        try:
            messages = json.loads(given["question"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f'the question is no JSON ({error!s:.100}). Give "question": '
                'json.dumps([{"role": "user", "content": "..."}])',
                "form",
            ) from error
        if isinstance(messages, list):
            messages = [renamed(turn) if isinstance(turn, dict) else turn for turn in messages]
        [answer] = self.model.generate([Request(messages, pictures)], self.generation)
        return answer.text.strip()

    process = chat  # the name under which it was announced


def renamed(turn: dict) -> dict:
    return {NAMES.get(name, name): value for name, value in turn.items()}
