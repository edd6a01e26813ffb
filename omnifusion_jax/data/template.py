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
        question = [("user", PROBE)]
        forms = [form for form in FORMS if proper(self.try_render(question, [1], form), image_token)]
        if not forms:
            raise DataError(f"the chat template puts neither {image_token!r} nor the text of a turn where they belong; correct model.template")
        self.form = forms[0]

    def __call__(self, turns, pictures, ask, where):
        """(ids int32[n], loss weights float32[n]) of turns ("user", "assistant" or "system", text);
        `pictures` counts those of each turn.
        """
        text = self.render(turns, pictures, self.form, ask, where)
        if any(role == "system" and said.strip() not in text for role, said in turns):
            raise DataError(f"{where}: the chat template leaves the system's turn out. Say it in the first question")
        ids, offsets = self.tokenizer.encode_all(text)
        weights = np.zeros(len(ids), np.float32)
        for i, (role, _) in enumerate(turns):
            if role == "assistant" and not ask:
                before, after = (self.render(turns[:n], pictures, self.form, n == i, where) for n in (i, i + 1))
                if not (text.startswith(before) and text.startswith(after)):
                    raise DataError(f"{where}: the chat template changes earlier turns when another follows; it cannot be trained on")
                weights[(offsets[:, 0] >= len(before)) & (offsets[:, 1] > len(before)) & (offsets[:, 1] <= len(after))] = 1
        return ids, weights

    def render(self, turns, pictures, form, ask, where):
        messages = [{"role": role, "content": form(text, n, self.image_token)} for (role, text), n in zip(turns, pictures, strict=False)]
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


def in_parts(text, pictures, image_token):
    return [{"type": "image"}] * pictures + [{"type": "text", "text": text}]


def in_one_string(text, pictures, image_token):
    return f"{image_token}\n" * pictures + text


FORMS = (in_parts, in_one_string)  # templates of vision-language models take the former, those of language models the latter


@functools.cache
def renderer():
    from transformers.utils.chat_template_utils import render_jinja_template  # heavy, and rarely needed

    return render_jinja_template
