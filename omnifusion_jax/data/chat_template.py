"""Renders dialogues to token ids with a chat template, as checkpoints on the Hugging Face Hub bring one."""

import functools
from collections.abc import Mapping, Sequence

import jinja2
import numpy as np

from omnifusion_jax.data.modality import content_parts, marked, pieces
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES

PROBE = "probe"


class Template:
    """Renders dialogues with the Jinja template `source`, which writes a token for each media item.

    The whole rendered text is encoded at once. It starts with the beginning-of-sequence token if the
    tokenizer adds one and the template does not.

    Args:
      tokens: {stream: the token that the template writes for one of its media items}.

    Raises:
      DataError: the template cannot be rendered, or loses media or text.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], tokenizer):
        self.source, self.tokenizer = source, tokenizer
        self.ids = {tokenizer.mark(token): stream for stream, token in tokens.items()}
        self.by_mark = {MODALITIES[stream].mark: token for stream, token in tokens.items()}
        problems = {form: self.problem(form) for form in FORMS}
        self.form = next((form for form, problem in problems.items() if problem is None), None)
        if self.form is None:
            named = " and ".join(map(repr, tokens.values()))
            raise DataError(
                f"the chat template puts neither {named} nor the text of a turn where they belong"
                f"{problems[FORMS[0]]}; correct model.template"
            )

    def __call__(
        self, turns: Sequence[tuple[str, str]], ask: bool, where: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32[n] and loss weights float32[n] of a dialogue.

        Args:
          turns: (role, text), where the role is "user", "assistant" or "system" and the text has a mark for
            each media item.
          ask: ends with the template's generation prompt; no token is then a target.
          where: names the dialogue in errors.

        Raises:
          DataError: the template cannot render the turns, leaves out the system's, or changes earlier ones.
        """
        text = self.render(turns, self.form, ask, where)
        if any(role == "system" and said.strip() not in text for role, said in turns):
            raise DataError(
                f"{where}: the chat template leaves the system's turn out. Say it in the first question",
                "speaker",
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
                    "it cannot be trained on",
                    "template",
                )
            starts, ends = offsets[:, 0], offsets[:, 1]
            weights[(starts >= len(before)) & (ends > len(before)) & (ends <= len(after))] = 1
        return ids, weights

    def render(self, turns, form, ask, where):
        """The text that the template makes of `turns`, whose content has one of FORMS. Raises DataError."""
        messages = [{"role": role, "content": form(text, self.by_mark)} for role, text in turns]
        try:
            rendered = renderer()(
                [messages], chat_template=self.source, add_generation_prompt=ask, **self.tokenizer.names
            )
            return rendered[0][0]  # (texts, positions), the text of the only dialogue
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(
                f"{where}: the chat template cannot render this dialogue ({error!s:.200})", "template"
            ) from error

    def problem(self, form):
        """What is wrong with the template for content of this form, as the end of a sentence; or None."""
        for mark, token in self.by_mark.items():
            try:
                text = self.render([("user", mark + PROBE)], form, True, "a question")
            except DataError as error:
                return f" ({error})"
            # a list of parts must not be printed as it is
            if text.count(PROBE) != 1 or text.count(token) != 1 or "'type'" in text:
                return ""
        return None


def in_parts(text, by_mark):
    """The content as a list of parts: media where the text marks them, and the text around them."""
    return content_parts(text)


def in_one_string(text, by_mark):
    """The content as one string, in which media before the text have a line of their own each."""
    between = pieces(text)
    leading = next((i for i, piece in enumerate(between[::2]) if piece), len(between[1::2]))
    breaks = ["\n" * (i < leading) for i in range(len(between[1::2]))]
    tokens = [by_mark[mark] + after for mark, after in zip(marked(text), breaks, strict=True)]
    return "".join(piece + token for piece, token in zip(between[::2], [*tokens, ""], strict=True))


# Templates of vision-language models take content in parts, those of language models take one string.
FORMS = (in_parts, in_one_string)


@functools.cache
def renderer():
    from transformers.utils.chat_template_utils import render_jinja_template  # heavy, rarely needed

    return render_jinja_template
