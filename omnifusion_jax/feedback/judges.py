"""Who says whether a claim about a picture is true: a model of the library, or one behind an address.

A judge has `yes(picture sources, questions)`, which gives for each question how likely yes is, from 0 to 1;
`ask(text)`, which gives an answer to a text alone; and `name`, which says who it is, for JSON.
"""

import base64
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.dialogues import Request
from omnifusion_jax.data.images import open_image
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.inference.fingerprint import fingerprint
from omnifusion_jax.inference.model import Model

YES, NO = ("yes", "Yes"), ("no", "No")
TRIES, PATIENCE = (
    4,
    2.0,
)  # requests that fail are sent again, after so many seconds, and twice as many each time


class Own:
    """A Model as a judge: the probability of yes against no at the first token of its answer."""

    def __init__(self, model: Model):
        self.model = model
        found = fingerprint(model)
        self.name = {"weights": found["weights"], "tokenizer": found["tokenizer"], "dtype": found["dtype"]}
        first = [{model.tokenizer.encode(word)[0] for word in words} for words in (YES, NO)]
        # a token that both begin with, such as one for a space before a capital, says nothing
        self.ids = [sorted(ids - (first[0] & first[1])) for ids in first]
        if not all(self.ids):
            raise ConfigError("yes and no begin with one token in the judge's tokenizer: it cannot judge")

    def yes(self, images: Sequence[Any], questions: Sequence[str]) -> list[float]:
        requests = [Request([{"role": "user", "content": text}], list(images)) for text in questions]
        last = np.stack([logits[-1] for logits in self.model.logits(requests)]).astype(np.float64)
        yes, no = (np.logaddexp.reduce(last[:, ids], axis=1) for ids in self.ids)
        return (1 / (1 + np.exp(no - yes))).tolist()

    def ask(self, text: str) -> str:
        request = Request([{"role": "user", "content": text}])
        return self.model.generate([request], GenerationConfig(max_new_tokens=512))[0].text


class Remote:
    """A model behind an OpenAI-compatible address, such as http://host:8000/v1; yes is 1 and no 0.

    The key, if it needs one, is in the environment variable OPENAI_API_KEY.
    """

    def __init__(self, url: str, model: str):
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self.name = {"url": url, "model": model}

    def yes(self, images, questions):
        pictures = [{"type": "image_url", "image_url": {"url": data_url(source)}} for source in images]
        return [verdict(self.said([*pictures, {"type": "text", "text": text}], 5)) for text in questions]

    def ask(self, text):
        return self.said(text, 512)

    def said(self, content, most):
        """The answer to a message. Raises DataError when none comes."""
        body = {"model": self.model, "temperature": 0, "max_tokens": most}
        body["messages"] = [{"role": "user", "content": content}]
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=300) as answer:
                    return json.load(answer)["choices"][0]["message"]["content"]
            except urllib.error.HTTPError as error:
                problem, again = f"{error.code} {error.reason}", error.code == 429 or error.code >= 500
            except (urllib.error.URLError, TimeoutError) as error:
                problem, again = str(getattr(error, "reason", error)), True
            except (ValueError, KeyError, IndexError, TypeError):
                problem, again = "the answer has no choices[0].message.content", False
            if not again or attempt + 1 == TRIES:
                break
            time.sleep(PATIENCE * 2**attempt)
        raise DataError(f"{self.url}: {problem}. See to the address, its model and OPENAI_API_KEY")


def verdict(text: str) -> float:
    """1 for an answer that begins with yes, 0 for no; 0.5 for any other, which decides nothing."""
    word = re.match(r"\W*(\w*)", text)[1].lower()
    return {"yes": 1.0, "no": 0.0}.get(word, 0.5)


def data_url(source: Any) -> str:
    """A picture as a PNG in a data URL."""
    picture = open_image(source)
    with io.BytesIO() as file:
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, "png")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
