"""Where everything stands in a sequence.

    omnifusion  prompt | SOI | image features | EOI | USER | text | BOT | answer </s> | USER | text | BOT | ...
    original    the same, as the published loader has it
    text        prompt | SOI | image features | EOI | "User:" text "AI:" | answer </s> | ...
    template    what the model's chat template writes, image features where it marks a picture

SOI to EOI is there when the dialogue has a picture. USER, BOT, SOI and EOI are trained vectors, not tokens. Every piece of text is encoded alone and
without a beginning-of-sequence token, but for "template", where all text is one piece.
"""

import dataclasses

import numpy as np

from omnifusion_jax.batch import FEATURE, SPECIAL, TEXT, Sample
from omnifusion_jax.data.dialogues import ROLES
from omnifusion_jax.data.template import Template
from omnifusion_jax.data.tiles import NEWLINE
from omnifusion_jax.errors import DataError

MARK = "<image>"
ANSWER = "assistant"


class Layout:
    """Lays dialogues out, as `config.layout` says.

    "original" takes text as it is (a literal "<image>" is text, and so is a space); in LLaVA's form, the only
    one that the published loader knows, whoever is not "human" is the assistant; no end of sequence follows
    an answer, and what exceeds `max_length` is cut off.

    The others count and remove the marks of LLaVA data, the end-of-sequence token follows every answer and is
    a target, and a dialogue that is too long, starts with the assistant or leaves nothing to learn is a
    DataError. "template" alone has a place for a system's turn.
    """

    def __init__(self, tokenizer, config, max_length):
        self.tokenizer, self.config, self.max_length = tokenizer, config, max_length
        self.original = config.layout == "original"
        self.prompt = tokenizer.encode(config.prompt)
        self.arrange = {"text": self.in_words, "template": self.in_template}.get(config.layout, self.in_vectors)
        self.template = Template(config.template, config.image_token, tokenizer) if config.layout == "template" else None

    def __call__(self, dialogue, pictures, ask=False):
        """A Dialogue and its Pictures to a Sample. `ask`: the answer that comes next is the model's to give."""
        turns = self.check(dialogue, len(pictures), ask)
        parts = self.arrange(dialogue, turns, list(self.features(pictures)), ask)
        tokens, kind, index, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        views = [np.concatenate(views) for views in zip(*(p.views for p in pictures), strict=True)]
        views = views or [np.zeros((0, view.size, view.size, 3), np.uint8) for view in self.config.views]
        return self.fit(Sample(tokens, kind, index, weights, tuple(views), sum(len(p.walk) for p in pictures)), dialogue.where, ask)

    def in_vectors(self, dialogue, turns, pictures, ask):
        yield from self.opening(pictures)
        for role, text in turns:
            yield self.special("bot" if role == ANSWER else "user")
            yield self.answer(text) if role == ANSWER else self.text(self.tokenizer.encode(text))
        if ask:
            yield self.special("bot")

    def in_words(self, dialogue, turns, pictures, ask):
        yield from self.opening(pictures)
        for i, (role, text) in enumerate(turns):
            answered = ask if i + 1 == len(turns) else turns[i + 1][0] == ANSWER
            question = self.config.user + text + self.config.bot * answered
            yield self.answer(text) if role == ANSWER else self.text(self.tokenizer.encode(question))

    def in_template(self, dialogue, turns, pictures, ask):
        ids, targets = self.template(turns, places(dialogue, len(pictures)), ask, dialogue.where)
        here = np.flatnonzero(ids == self.template.image_id)
        if len(here) != len(pictures):
            raise DataError(f"{dialogue.where}: the chat template marks {len(here)} pictures, the dialogue has {len(pictures)}")
        ends = [*here, len(ids)]
        yield self.text(ids[: ends[0]], targets[: ends[0]])
        for features, start, end in zip(pictures, ends, ends[1:], strict=False):
            yield features
            yield self.text(ids[start + 1 : end], targets[start + 1 : end])

    def opening(self, pictures):
        yield self.text(self.prompt)
        for features in pictures:
            yield from (self.special("soi"), features, self.special("eoi"))

    def answer(self, text):
        ids = self.tokenizer.encode(text)
        return self.text(ids if self.original else [*ids, self.tokenizer.eos], weight=1.0)

    def text(self, ids, weight=0.0):
        n = len(ids)
        return np.array(ids, np.int32), np.full(n, TEXT, np.int32), np.zeros(n, np.int32), np.broadcast_to(np.float32(weight), n)

    def special(self, name):
        index = self.config.special.index(name)
        return np.array([self.tokenizer.pad], np.int32), np.array([SPECIAL], np.int32), np.array([index], np.int32), np.zeros(1, np.float32)

    def features(self, pictures):
        """The slots of each picture; feature rows are counted through all of them."""
        first = 0
        for picture in pictures:
            n, newline = len(picture.walk), picture.walk == NEWLINE
            index = picture.walk + np.int32(first)
            if newline.any():
                index[newline] = self.config.special.index("newline")
            kind = np.where(newline, SPECIAL, FEATURE).astype(np.int32)
            yield np.full(n, self.tokenizer.pad, np.int32), kind, index, np.zeros(n, np.float32)
            first += len(picture.views[0]) * self.config.rows

    def fit(self, sample, where, ask):
        n = len(sample.tokens)
        if n <= self.max_length:
            return sample
        if self.original and not ask:
            return Sample(*(column[: self.max_length] for column in sample[:4]), sample.images, sample.slots)
        advice = "Shorten or split the dialogue, or raise max_length (data.max_length in training)"
        raise DataError(f"{where}: {n} tokens, but max_length is {self.max_length}. {advice}")

    def read(self, dialogue):
        """The turns as this layout takes them, ("user", "assistant" or "system", text). Raises DataError."""
        if self.original and dialogue.marked:
            return [("user" if role == "human" else ANSWER, text) for role, text in dialogue.turns]
        for i, (role, _) in enumerate(dialogue.turns):
            if role not in ROLES:
                raise DataError(f"{dialogue.where}: turn {i} is from {role!r}; known are {', '.join(ROLES)}")
            if role == "system" and self.template is None:
                place = f"layout {self.config.layout!r} has no place for it: what it says belongs in model.prompt"
                raise DataError(f"{dialogue.where}: turn {i} is from 'system', and {place}")
        return [(ROLES[role], text if self.original else without_marks(text)) for role, text in dialogue.turns]

    def messages(self, dialogue):
        """The turns as a Request holds them: a model is asked in the words that it was taught with.

        Raises DataError.
        """
        if not self.original:
            check_marks(dialogue, len(dialogue.images))
        shown = places(dialogue, len(dialogue.images)) if self.template else [0] * len(dialogue.turns)
        return [{"role": role, "content": content(text, n)} for (role, text), n in zip(self.read(dialogue), shown, strict=True)]

    def check(self, dialogue, images, ask):
        """What `read` gives, if it can be laid out. Raises DataError."""
        where = dialogue.where
        if images > 1:
            raise DataError(f"{where}: {images} pictures, but this layout has one place, before the first turn. Give one picture a dialogue")
        for i, (_, text) in enumerate(dialogue.turns):
            if not (text if self.original else text.strip()):
                raise DataError(f"{where}: turn {i} is empty. Remove the turn or write its text")
        turns = self.read(dialogue)
        spoken = [role for role, _ in turns if role != "system"]
        if ask and spoken[-1:] != ["user"]:
            raise DataError(f"{where}: the last turn is the {(spoken or ['system'])[-1]}'s. End with a question")
        if self.template is None and any(dialogue.places[1:]):
            later = next(i for i, n in enumerate(dialogue.places) if i and n)
            advice = "Move it to the first turn, or use a model whose layout is 'template'"
            raise DataError(f"{where}: turn {later} shows a picture, but this layout shows pictures before the first turn. {advice}")
        if self.original:
            return turns
        if spoken[:1] == [ANSWER]:
            raise DataError(f"{where}: the dialogue starts with the assistant. The first turn must be the user's")
        if not ask and ANSWER not in spoken:
            raise DataError(f"{where}: no turn of the assistant, hence nothing to learn from. Add an answer or remove the dialogue")
        check_marks(dialogue, images)
        texts = [text for _, text in turns]
        if "" in texts:
            raise DataError(f"{where}: turn {texts.index('')} holds nothing but {MARK}. Write its text")
        return turns


@dataclasses.dataclass
class Prepare:
    """Dialogue to Sample: `lens` makes Pictures of what it shows, `layout` the sequence."""

    layout: object
    lens: object

    def __call__(self, dialogue, ask=False):
        """Raises DataError, which begins with where the dialogue comes from."""
        try:
            pictures = [self.lens(source) for source in dialogue.images]
        except DataError as error:
            raise DataError(f"{dialogue.where}: {error}") from error
        return self.layout(dialogue, pictures, ask)


def places(dialogue, pictures):
    """How many pictures each turn shows, as its parts or marks say; else the first has all, or the second
    where the first is the system's.
    """
    marks = [text.count(MARK) for _, text in dialogue.turns]
    if dialogue.places or any(marks):
        return dialogue.places or marks
    first = next((i for i, (role, _) in enumerate(dialogue.turns) if role != "system"), 0)
    return [pictures * (i == first) for i in range(len(dialogue.turns))]


def content(text, pictures):
    """What a message says, with as many parts before it as it shows pictures."""
    return [*[{"type": "image"}] * pictures, {"type": "text", "text": text}] if pictures else text


def check_marks(dialogue, images):
    """Raises DataError unless the text of a Dialogue marks as many pictures as it has; messages need no marks."""
    marks = sum(text.count(MARK) for _, text in dialogue.turns)
    if marks and dialogue.places:
        raise DataError(f"{dialogue.where}: pictures stand as parts and as {MARK} in the text. Remove the marks")
    if marks != images and (dialogue.marked or marks):
        raise DataError(
            f'{dialogue.where}: the text has {marks} {MARK} {"mark" if marks == 1 else "marks"} but "image" lists {images} '
            f"{'file' if images == 1 else 'files'}. Add the missing file or remove a mark"
        )


def without_marks(text):
    if MARK not in text:
        return text
    return text.replace(MARK + "\n", "").replace("\n" + MARK, "").replace(MARK, "").strip()
