"""A chat template, as checkpoints on the Hugging Face Hub bring it, rendered to token ids."""

import functools
import re

import jinja2
import numpy as np

from omnifusion_jax.data.dialogues import MARKS
from omnifusion_jax.errors import DataError

PROBE, MARK = "probe", MARKS["image"]


class Template:
    """Renders dialogues with a Jinja `source` in which `image_token` marks a picture.

    Text between the marks is encoded in one go. The beginning-of-sequence token comes first where the tokenizer adds one and the template does not.
    Raises DataError for a template that cannot be rendered.
    """

    def __init__(self, source, image_token, tokenizer):
        self.source, self.image_token, self.tokenizer = source, image_token, tokenizer
        self.image_id = tokenizer.mark(image_token)
        question = [("user", MARK + PROBE)]
        forms = [form for form in FORMS if proper(self.try_render(question, form), image_token)]
        if not forms:
            raise DataError(
                f"the chat template puts neither {image_token!r} nor the text of a turn where they belong; correct model.template"
            )
        self.form = forms[0]

    def __call__(self, turns, ask, where):
        """(ids int32[n], loss weights float32[n]) of turns ("user", "assistant" or "system", text with a mark for each
        picture).
        """
        text = self.render(turns, self.form, ask, where)
        if any(role == "system" and said.strip() not in text for role, said in turns):
            raise DataError(
                f"{where}: the chat template leaves the system's turn out. Say it in the first question"
            )
        ids, offsets = self.tokenizer.encode_all(text)
        weights = np.zeros(len(ids), np.float32)
        for i, (role, _) in enumerate(turns):
            if role == "assistant" and not ask:
                before, after = (self.render(turns[:n], self.form, n == i, where) for n in (i, i + 1))
                if not (text.startswith(before) and text.startswith(after)):
                    raise DataError(
                        f"{where}: the chat template changes earlier turns when another follows; it cannot be trained on"
                    )
                weights[
                    (offsets[:, 0] >= len(before))
                    & (offsets[:, 1] > len(before))
                    & (offsets[:, 1] <= len(after))
                ] = 1
        return ids, weights

    def render(self, turns, form, ask, where):
        messages = [{"role": role, "content": form(text, self.image_token)} for role, text in turns]
        try:
            return renderer()(
                [messages], chat_template=self.source, add_generation_prompt=ask, **self.tokenizer.names
            )[0][0]
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: the chat template cannot render this dialogue ({error!s:.200})"
            ) from error

    def try_render(self, turns, form):
        try:
            return self.render(turns, form, True, "the chat template")
        except DataError:
            return ""


def proper(text, image_token):
    return text.count(PROBE) == 1 and text.count(image_token) == 1 and "'type'" not in text


def in_parts(text, image_token):
    """Pictures first where they stand before the text, and among it where it marks them."""
    pieces = re.split(f"({re.escape(MARK)})", text)
    return [
        {"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece
    ]


def in_one_string(text, image_token):
    """A picture that stands before the text has a line of its own."""
    first = re.match(f"({re.escape(MARK)})*", text)[0]
    return (first.replace(MARK, f"{MARK}\n") + text[len(first) :]).replace(MARK, image_token)


FORMS = (
    in_parts,
    in_one_string,
)  # templates of vision-language models take the former, those of language models the latter


@functools.cache
def renderer():
    from transformers.utils.chat_template_utils import render_jinja_template  # heavy, and rarely needed

    return render_jinja_template
