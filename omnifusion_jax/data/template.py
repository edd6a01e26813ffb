"""A chat template, as checkpoints on the Hugging Face Hub bring it, rendered to token ids."""

import functools

import jinja2
import numpy as np

from omnifusion_jax.errors import DataError

PROBE = "probe"


class Template:
    """Renders dialogues with a Jinja `source` in which `image_token` marks a picture.

    Text between the marks is encoded in one go. The beginning-of-sequence token comes first where the tokenizer adds one and the template does not.
    Raises DataError for a template that cannot be rendered.
    """

    def __init__(self, source, image_token, tokenizer):
        self.source, self.image_token, self.tokenizer = source, image_token, tokenizer
        self.image_id = tokenizer.mark(image_token)
        question = [(False, PROBE)]
        forms = [form for form in FORMS if proper(self.try_render(question, [1], form), image_token)]
        if not forms:
            raise DataError(f"the chat template puts neither {image_token!r} nor the text of a turn where they belong; correct model.template")
        self.form = forms[0]

    def __call__(self, turns, pictures, ask, where):
        """(ids int32[n], loss weights float32[n]) of turns (is_answer, text); `pictures` counts those of each turn."""
        text = self.render(turns, pictures, self.form, ask, where)
        ids, offsets = self.tokenizer.encode_all(text)
        weights = np.zeros(len(ids), np.float32)
        for i, (is_answer, _) in enumerate(turns):
            if is_answer and not ask:
                before, after = (self.render(turns[:n], pictures, self.form, n == i, where) for n in (i, i + 1))
                if not (text.startswith(before) and text.startswith(after)):
                    raise DataError(f"{where}: the chat template changes earlier turns when another follows; it cannot be trained on")
                weights[(offsets[:, 0] >= len(before)) & (offsets[:, 1] > len(before)) & (offsets[:, 1] <= len(after))] = 1
        return ids, weights

    def render(self, turns, pictures, form, ask, where):
        messages = [form(is_answer, text, n, self.image_token) for (is_answer, text), n in zip(turns, pictures, strict=False)]
        try:
            return renderer()([messages], chat_template=self.source, add_generation_prompt=ask, **self.tokenizer.names)[0][0]
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"{where}: the chat template cannot render this dialogue ({error!s:.200})") from error

    def try_render(self, turns, pictures, form):
        try:
            return self.render(turns, pictures, form, True, "the chat template")
        except DataError:
            return ""


def proper(text, image_token):
    return text.count(PROBE) == 1 and text.count(image_token) == 1 and "'type'" not in text


def in_parts(is_answer, text, pictures, image_token):
    parts = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
    return {"role": "assistant" if is_answer else "user", "content": parts}


def in_one_string(is_answer, text, pictures, image_token):
    return {"role": "assistant" if is_answer else "user", "content": f"{image_token}\n" * pictures + text}


FORMS = (in_parts, in_one_string)  # templates of vision-language models take the former, those of language models the latter


@functools.cache
def renderer():
    from transformers.utils.chat_template_utils import render_jinja_template  # heavy, and rarely needed

    return render_jinja_template
