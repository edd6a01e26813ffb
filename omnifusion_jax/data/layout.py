"""Where everything stands in a sequence.

    prompt | SOI | image features | EOI | USER | text | BOT | answer </s> | USER | text | BOT | ...

SOI to EOI is there when the dialogue has a picture. USER, BOT, SOI and EOI are trained vectors, not tokens. Every piece of text is encoded alone and
without a beginning-of-sequence token.
"""

import numpy as np

from omnifusion_jax.batch import BOT, EOI, FEATURE, SOI, SPECIAL, TEXT, USER, Sample
from omnifusion_jax.data.dialogues import ROLES
from omnifusion_jax.errors import DataError

MARK = "<image>"


class Layout:
    """Lays dialogues out. `rows` is the number of feature rows a picture gives.

    style "original": the published loader to the letter. Text is taken as it is (a literal "<image>" is text), whoever is not the human is the
    assistant, no end of sequence follows an answer, and what exceeds `max_length` is cut off.

    style "omnifusion": the marks of LLaVA data are counted and removed, the end-of-sequence token follows every answer and is a target, and a
    dialogue that is too long, starts with the assistant or leaves nothing to learn is a DataError.
    """

    def __init__(self, tokenizer, prompt, style, rows, max_length):
        self.tokenizer, self.style, self.rows, self.max_length = tokenizer, style, rows, max_length
        self.prompt = tokenizer.encode(prompt)

    def __call__(self, dialogue, images, ask=False):
        """A Dialogue and its pictures, uint8[images, size, size, 3], to a Sample. `ask`: the answer that comes next is the model's to give."""
        turns = self.check(dialogue, len(images), ask)
        parts = [self.text(self.prompt)]
        if len(images):
            parts += [self.special(SOI), self.features(), self.special(EOI)]
        for is_answer, text in turns:
            ids = self.tokenizer.encode(text)
            if is_answer and self.style == "omnifusion":
                ids = [*ids, self.tokenizer.eos]
            parts += [self.special(BOT if is_answer else USER), self.text(ids, weight=float(is_answer))]
        if ask:
            parts.append(self.special(BOT))
        tokens, kind, index, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        return self.fit(Sample(tokens, kind, index, weights, images), dialogue.where, ask)

    def text(self, ids, weight=0.0):
        n = len(ids)
        return np.array(ids, np.int32), np.full(n, TEXT, np.int32), np.zeros(n, np.int32), np.full(n, weight, np.float32)

    def special(self, which):
        return np.array([self.tokenizer.pad], np.int32), np.array([SPECIAL], np.int32), np.array([which], np.int32), np.zeros(1, np.float32)

    def features(self):
        n = self.rows
        return np.full(n, self.tokenizer.pad, np.int32), np.full(n, FEATURE, np.int32), np.arange(n, dtype=np.int32), np.zeros(n, np.float32)

    def fit(self, sample, where, ask):
        n = len(sample.tokens)
        if n <= self.max_length:
            return sample
        if self.style == "original" and not ask:
            return Sample(*(column[: self.max_length] for column in sample[:4]), sample.images)
        advice = "Shorten or split the dialogue, or raise max_length (data.max_length in training)"
        raise DataError(f"{where}: {n} tokens, but max_length is {self.max_length}. {advice}")

    def check(self, dialogue, images, ask):
        """The turns as (is_answer, text). Raises DataError."""
        where, turns = dialogue.where, dialogue.turns
        if images > 1:
            raise DataError(f"{where}: {images} pictures, but this layout has one place, before the first turn. Give one picture a dialogue")
        for i, (_, text) in enumerate(turns):
            if not text.strip():
                raise DataError(f"{where}: turn {i} is empty. Remove the turn or write its text")
        if self.style == "original":
            return [(role not in ("human", "user"), text) for role, text in turns]
        for i, (role, _) in enumerate(turns):
            if role not in ROLES:
                raise DataError(f"{where}: turn {i} is from {role!r}; known are {', '.join(ROLES)}")
        answers = [ROLES[role] == "assistant" for role, _ in turns]
        if answers[0]:
            raise DataError(f"{where}: the dialogue starts with the assistant. The first turn must be the user's")
        if ask and answers[-1]:
            raise DataError(f"{where}: the last turn is the assistant's. End with a question")
        if not ask and not any(answers):
            raise DataError(f"{where}: no turn of the assistant, hence nothing to learn from. Add an answer or remove the dialogue")
        check_marks(dialogue, images)
        texts = [without_marks(text) for _, text in turns]
        if "" in texts:
            raise DataError(f"{where}: turn {texts.index('')} holds nothing but {MARK}. Write its text")
        return list(zip(answers, texts, strict=True))


def check_marks(dialogue, images):
    """Raises DataError unless the text of a Dialogue marks as many pictures as it has; messages need no marks."""
    marks = sum(text.count(MARK) for _, text in dialogue.turns)
    if marks != images and (dialogue.marked or marks):
        raise DataError(
            f'{dialogue.where}: the text has {marks} {MARK} {"mark" if marks == 1 else "marks"} but "image" lists {images} '
            f"{'file' if images == 1 else 'files'}. Add the missing file or remove a mark"
        )


def without_marks(text):
    if MARK not in text:
        return text
    return text.replace(MARK + "\n", "").replace("\n" + MARK, "").replace(MARK, "").strip()
