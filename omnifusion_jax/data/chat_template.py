"""Renders dialogues to token ids with a chat template, as checkpoints on the Hugging Face Hub bring one."""

import functools
import re
from collections.abc import Sequence

import jinja2
import numpy as np

from omnifusion_jax.data.dialogues import MARKS
from omnifusion_jax.errors import DataError

PROBE, MARK = "probe", MARKS["image"]


class Template:
    """Renders dialogues with the Jinja template `source`, which writes `image_token` for a picture.

    The whole rendered text is encoded at once. It starts with the beginning-of-sequence token if the
    tokenizer adds one and the template does not.

    Raises:
      DataError: the template cannot be rendered, or loses pictures or text.
    """

    def __init__(self, source: str, image_token: str, tokenizer):
        self.source, self.image_token, self.tokenizer = source, image_token, tokenizer
        self.image_id = tokenizer.mark(image_token)
        question = [("user", MARK + PROBE)]
        forms = [form for form in FORMS if proper(self.try_render(question, form), image_token)]
        if not forms:
            raise DataError(
                f"the chat template puts neither {image_token!r} nor the text of a turn where they belong; "
                "correct model.template"
            )
        self.form = forms[0]

    def __call__(
        self, turns: Sequence[tuple[str, str]], ask: bool, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32[n] and loss weights float32[n] of a dialogue.

        Args:
          turns: (role, text), where the role is "user", "assistant" or "system" and the text has a mark for
            each picture.
          ask: ends with the template's generation prompt; no token is then a target.
          where: names the dialogue in errors.

        Raises:
          DataError: the template cannot render the turns, leaves out the system's, or changes earlier ones.
        """
        text = self.render(turns, self.form, ask, where)
        if any(role == "system" and said.strip() not in text for role, said in turns):
            raise DataError(
                f"{where}: the chat template leaves the system's turn out. Say it in the first question"
            )
        ids, offsets = self.tokenizer.encode_all(text)
        weights = np.zeros(len(ids), np.float32)
        for i, (role, _) in enumerate(turns):
            if role != "assistant" or ask:
                continue
            # an answer is what the template writes between its generation prompt and the end of the turn
            before = self.render(turns[:i], self.form, True, where)
            after = self.render(turns[: i + 1], self.form, False, where)
            if not (text.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{where}: the chat template changes earlier turns when another follows; "
                    "it cannot be trained on"
                )
            starts, ends = offsets[:, 0], offsets[:, 1]
            weights[(starts >= len(before)) & (ends > len(before)) & (ends <= len(after))] = 1
        return ids, weights

    def render(self, turns, form, ask, where):
        """The text that the template makes of `turns`, whose content has one of FORMS. Raises DataError."""
        messages = [{"role": role, "content": form(text, self.image_token)} for role, text in turns]
        try:
            rendered = renderer()(
                [messages], chat_template=self.source, add_generation_prompt=ask, **self.tokenizer.names
            )
            return rendered[0][0]  # (texts, positions), the text of the only dialogue
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: the chat template cannot render this dialogue ({error!s:.200})"
            ) from error

    def try_render(self, turns, form):
        """The same with a generation prompt, or "" if the template cannot render it."""
        try:
            return self.render(turns, form, True, "the chat template")
        except DataError:
            return ""


def proper(text, image_token):
    """Whether a rendered text holds PROBE and one picture, and no list of parts that was printed as it is."""
    return text.count(PROBE) == 1 and text.count(image_token) == 1 and "'type'" not in text


def in_parts(text, image_token):
    """The content as a list of parts: pictures where the text marks them, and the text around them."""
    pieces = re.split(f"({re.escape(MARK)})", text)
    return [
        {"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece
    ]


def in_one_string(text, image_token):
    """The content as one string, in which pictures before the text have a line of their own."""
    first = re.match(f"({re.escape(MARK)})*", text)[0]
    return (first.replace(MARK, f"{MARK}\n") + text[len(first) :]).replace(MARK, image_token)


# Templates of vision-language models take content in parts, those of language models take one string.
FORMS = (in_parts, in_one_string)


@functools.cache
def renderer():
    from transformers.utils.chat_template_utils import render_jinja_template  # heavy, rarely needed

    return render_jinja_template
