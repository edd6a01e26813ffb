"""Renders dialogues to token ids with a chat template, as checkpoints on the Hugging Face Hub bring one."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jinja2

from omnifusion_jax.data.labels import LABELS, Rendered
from omnifusion_jax.data.modality import content_parts, marked, pieces
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import MODALITIES

PROBE = "probe"
Grid = tuple[int, int] | None  # of a media item, as Prepared has it


class Template:
    """Renders dialogues with the Jinja template `source`, which writes a token for each media item.

    The whole rendered text is encoded at once. It starts with the beginning-of-sequence token if the
    tokenizer adds one and the template does not.

    A media item with a grid reaches the template as {"type": "image", "rows": 2, "columns": 3}; the template
    then writes a token for each tile: first that of the whole item, then those of the grid row by row.

    Args:
      tokens: {stream: the token that the template writes for one of its media items, or for one tile}.
      labels: the row of LABELS that says what is learned.

    Raises:
      DataError: the template cannot be rendered, or loses media or text.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], tokenizer, labels: str = "turn"):
        self.source, self.tokenizer, self.labels = source, tokenizer, LABELS[labels]
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
        self, turns: Sequence[tuple[str, str]], ask: bool, where: str, grids: Sequence[Grid] = ()
    ) -> Rendered:
        """Token ids and loss weights of a dialogue.

        Args:
          turns: (role, text), where the role is "user", "assistant" or "system" and the text has a mark for
            each media item.
          ask: ends with the template's generation prompt; no token is then a target.
          where: names the dialogue in errors.
          grids: of its media items; those that are not listed have none.

        Raises:
          DataError: the template cannot render the turns, leaves out the system's, or changes earlier ones.
        """
        text = self.render(turns, self.form, ask, where, grids)
        if any(role == "system" and said.strip() not in text for role, said in turns):
            raise DataError(
                f"{where}: the chat template leaves the system's turn out. Say it in the first question",
                "speaker",
            )
        ids, offsets = self.tokenizer.encode_all(text)
        answers = []
        for i, (role, _) in enumerate(turns):
            if role != "assistant" or ask:
                continue
            # an answer is what the template writes between its generation prompt and the end of the turn
            before = self.render(turns[:i], self.form, True, where, grids)
            after = self.render(turns[: i + 1], self.form, False, where, grids)
            if not (text.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{where}: the chat template changes earlier turns when another follows; "
                    "it cannot be trained on",
                    "template",
                )
            starts, ends = offsets[:, 0], offsets[:, 1]
            answers.append((starts >= len(before)) & (ends > len(before)) & (ends <= len(after)))
        return (LABELS["turn"] if ask else self.labels)(ids, answers, self.tokenizer)

    def render(self, turns, form, ask, where, grids: Iterable[Grid] = ()):
        """The text that the template makes of `turns`, whose content has one of FORMS. Raises DataError."""
        rest = itertools.chain(grids, itertools.repeat(None))
        messages = [{"role": role, "content": form(text, self.by_mark, rest)} for role, text in turns]
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


def in_parts(text, by_mark, grids: Iterator[Grid]):
    """The content as a list of parts: media where the text marks them, and the text around them."""
    parts = content_parts(text)
    for part in parts:
        grid = None if part["type"] == "text" else next(grids)
        part |= dict(zip(("rows", "columns"), grid or (), strict=False))
    return parts


def in_one_string(text, by_mark, grids):
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
