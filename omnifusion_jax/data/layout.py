"""Where everything stands in a sequence.

    omnifusion  prompt | SOI | image features | EOI | USER | text | BOT | answer </s> | USER | text | BOT | ...
    original    the same, as the published loader has it
    text        prompt | SOI | image features | EOI | "User:" text "AI:" | answer </s> | ...
    template    what the model's chat template writes, image features where it marks a picture

SOI to EOI is there for each picture: before the first turn, or with model.image_place=mark where the text marks it. USER,
BOT, SOI and EOI are trained vectors, not tokens. Every piece of text is encoded alone and without a beginning-of-sequence
token, but for "template", where all text is one piece.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from omnifusion_jax.batch import FEATURE, SPECIAL, TEXT, UNKNOWN, Sample
from omnifusion_jax.data.chat_template import Template
from omnifusion_jax.data.dialogues import MARKS, ROLES
from omnifusion_jax.data.pictures import ImageProcessor
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import LAYOUTS

MARK = MARKS["image"]
LENSES = {"image": ImageProcessor}  # what prepares the media of each stream
ANSWER = "assistant"


class Style(NamedTuple):
    """A row of LAYOUTS."""

    vectors: tuple[str, ...]  # the trained vectors that it has
    # (Layout, Dialogue, turns, features of each media item, ask) to pieces of the sequence, as `Layout.text` and
    # `Layout.special` make them
    arrange: Callable


class Layout:
    """Lays dialogues out, as `config.layout` says.

    "original" takes text as it is (a literal "<image>" is text, and so is a space) and one picture; in LLaVA's form, the
    only one that the published loader knows, whoever is not "human" is the assistant; no end of sequence follows an answer,
    a target that the tokenizer does not know costs nothing, and what exceeds `max_length` is cut off.

    The others count and remove the marks of LLaVA data, the end-of-sequence token follows every answer and is
    a target, and a dialogue that is too long, starts with the assistant or leaves nothing to learn is a
    DataError. "template" alone has a place for a system's turn.
    """

    def __init__(self, tokenizer, config, max_length):
        # It holds what it needs of the config and no more: processes that only read have no use for JAX.
        self.tokenizer, self.max_length = tokenizer, max_length
        self.name, self.vectors, self.streams = config.layout, config.special, tuple(config.streams)
        self.user, self.bot, self.placed = config.user, config.bot, config.image_place == "mark"
        self.original = config.layout == "original"
        self.prompt = tokenizer.encode(config.prompt)
        self.template = (
            Template(config.template, config.image_token, tokenizer) if config.layout == "template" else None
        )

    def __call__(self, dialogue, prepared, ask=False):
        """A Dialogue and its media, Prepared, to a Sample. `ask`: the answer that comes next is the model's to give."""
        turns = self.check(dialogue, len(prepared), ask)
        features = list(self.features([media.stream for media in dialogue.media], prepared))
        parts = LAYOUTS[self.name].arrange(self, dialogue, turns, features, ask)
        tokens, kind, index, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        media = {}
        for (stream, _), one in zip(dialogue.media, prepared, strict=True):
            media.setdefault(stream, []).append(one.views)
        media = {
            stream: tuple(map(np.concatenate, zip(*views, strict=True))) for stream, views in media.items()
        }
        media_positions = sum(len(one.order) for one in prepared)
        return self.within_length(
            Sample(tokens, kind, index, weights, media, len(prepared), media_positions), dialogue.where, ask
        )

    def in_vectors(self, dialogue, turns, media, ask):
        rest = iter(media)
        yield from self.opening(rest)
        for role, text in turns:
            yield self.special("bot" if role == ANSWER else "user")
            yield from [self.answer(text)] if role == ANSWER else self.among(text, rest)
        if ask:
            yield self.special("bot")

    def in_words(self, dialogue, turns, media, ask):
        rest = iter(media)
        yield from self.opening(rest)
        for i, (role, text) in enumerate(turns):
            answered = ask if i + 1 == len(turns) else turns[i + 1][0] == ANSWER
            yield from (
                [self.answer(text)]
                if role == ANSWER
                else self.among(self.user + text + self.bot * answered, rest)
            )

    def in_template(self, dialogue, turns, media, ask):
        ids, targets = self.template(turns, ask, dialogue.where)
        here = np.flatnonzero(ids == self.template.image_id)
        if len(here) != len(media):
            raise DataError(
                f"{dialogue.where}: the chat template marks {len(here)} pictures, the dialogue has {len(media)}"
            )
        ends = [*here, len(ids)]
        yield self.text(ids[: ends[0]], targets[: ends[0]])
        for features, start, end in zip(media, ends, ends[1:], strict=False):
            yield features
            yield self.text(ids[start + 1 : end], targets[start + 1 : end])

    def opening(self, media):
        """The prompt, and what stands before the first turn."""
        yield self.text(self.prompt)
        for features in () if self.placed else media:
            yield from self.enclosed(features)

    def among(self, text, media):
        """A turn of the user, with the next of the media at each of its marks."""
        for i, piece in enumerate(text.split(MARK) if self.placed else [text]):
            if i:
                yield from self.enclosed(next(media))
            if piece or not i:
                yield self.text(self.tokenizer.encode(piece))

    def enclosed(self, features):
        yield from (self.special("soi"), features, self.special("eoi"))

    def answer(self, text):
        ids = self.tokenizer.encode(text)
        if not self.original:
            return self.text([*ids, self.tokenizer.eos], weight=1.0)
        tokens, kind, index, weights = self.text(ids, weight=1.0)
        return tokens, np.where(tokens == self.tokenizer.unk, UNKNOWN, kind).astype(np.int32), index, weights

    def text(self, ids, weight=0.0):
        n = len(ids)
        return (
            np.array(ids, np.int32),
            np.full(n, TEXT, np.int32),
            np.zeros(n, np.int32),
            np.broadcast_to(np.float32(weight), n),
        )

    def special(self, name):
        index = self.vectors.index(name)
        return (
            np.array([self.tokenizer.pad], np.int32),
            np.array([SPECIAL], np.int32),
            np.array([index], np.int32),
            np.zeros(1, np.float32),
        )

    def features(self, streams, prepared):
        """The positions of each media item; feature rows are counted through all items of its stream."""
        first = dict.fromkeys(streams, 0)
        for stream, one in zip(streams, prepared, strict=True):
            n, newline = len(one.order), one.order < 0
            index = one.order + np.int32(first[stream])
            if newline.any():
                index[newline] = self.vectors.index("newline")
            kind = np.where(newline, SPECIAL, FEATURE + self.streams.index(stream)).astype(np.int32)
            yield np.full(n, self.tokenizer.pad, np.int32), kind, index, np.zeros(n, np.float32)
            first[stream] += one.rows

    def within_length(self, sample, where, ask):
        n = len(sample.tokens)
        if n <= self.max_length:
            return sample
        if self.original and not ask:
            return Sample(*(column[: self.max_length] for column in sample[:4]), *sample[4:])
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
                place = f"layout {self.name!r} has no place for it: what it says belongs in model.prompt"
                raise DataError(f"{dialogue.where}: turn {i} is from 'system', and {place}")
        return [(ROLES[role], self.words(text, dialogue)) for role, text in dialogue.turns]

    def words(self, text, dialogue):
        """A turn's text: with its marks where media stand at them, without them where they stand elsewhere."""
        if self.template or self.placed:
            return without_breaks(text)
        return text if self.original and not dialogue.parted else without_marks(text)

    def marked(self, dialogue):
        """The dialogue with all marks where its media stand: where it has none, they are put before the first turn that
        may show something."""
        if self.original or not dialogue.media or any(MARK in text for _, text in dialogue.turns):
            return dialogue
        first = next((i for i, (role, _) in enumerate(dialogue.turns) if role != "system"), 0)
        turns = [
            (role, f"{MARK}\n" * len(dialogue.media) * (i == first) + text)
            for i, (role, text) in enumerate(dialogue.turns)
        ]
        return dataclasses.replace(dialogue, turns=tuple(turns))

    def messages(self, dialogue):
        """The turns as a Request holds them: a model is asked in the words that it was taught with.

        Raises DataError.
        """
        if not self.original:
            check_marks(dialogue)
        interleaved = self.template or self.placed
        found = self.read(self.marked(dialogue) if interleaved else dialogue)
        return [
            {"role": role, "content": content_parts(text) if interleaved else text} for role, text in found
        ]

    def check(self, dialogue, items, ask):
        """What `read` gives, if it can be laid out. Raises DataError."""
        where = dialogue.where
        if self.original and items > 1:
            raise DataError(
                f"{where}: {items} pictures, but layout 'original' has place for one. Give one picture a dialogue, or another model.layout"
            )
        for i, (_, text) in enumerate(dialogue.turns):
            if not (text if self.original else text.strip()):
                raise DataError(f"{where}: turn {i} is empty. Remove the turn or write its text")
        if not self.original:
            check_marks(dialogue)
        elif dialogue.parted and (
            later := [i for i, (_, text) in enumerate(dialogue.turns) if i and MARK in text]
        ):
            raise DataError(
                f"{where}: turn {later[0]} shows a picture, but layout 'original' shows it before the first turn. Move it there"
            )
        interleaved = self.template or self.placed
        turns = self.read(self.marked(dialogue) if interleaved else dialogue)
        spoken = [role for role, _ in turns if role != "system"]
        if ask and spoken[-1:] != ["user"]:
            raise DataError(
                f"{where}: the last turn is the {(spoken or ['system'])[-1]}'s. End with a question"
            )
        if self.original:
            return turns
        if spoken[:1] == [ANSWER]:
            raise DataError(
                f"{where}: the dialogue starts with the assistant. The first turn must be the user's"
            )
        if not ask and ANSWER not in spoken:
            raise DataError(
                f"{where}: no turn of the assistant, hence nothing to learn from. Add an answer or remove the dialogue"
            )
        for i, (role, text) in enumerate(turns):
            if not without_marks(text):
                raise DataError(f"{where}: turn {i} holds nothing but {MARK}. Write its text")
            if self.placed and role == ANSWER and MARK in text:
                raise DataError(
                    f"{where}: turn {i} is the assistant's and shows a picture. Move it to a turn of the user"
                )
        return turns


VECTORS = ("user", "bot", "soi", "eoi")
LAYOUTS["omnifusion"] = Style(VECTORS, Layout.in_vectors)
LAYOUTS["original"] = Style(VECTORS, Layout.in_vectors)  # the published loader to the letter
LAYOUTS["text"] = Style(("soi", "eoi"), Layout.in_words)
LAYOUTS["template"] = Style((), Layout.in_template)


@dataclasses.dataclass
class Prepare:
    """Dialogue to Sample: `processors` prepare the media of each stream, `layout` makes the sequence."""

    layout: object
    processors: dict

    @classmethod
    def of(cls, tokenizer, config, max_length, **settings):
        """For a ModelConfig; `settings` are those of the processors."""
        return cls(
            Layout(tokenizer, config, max_length),
            {name: LENSES[name].of(stream, **settings) for name, stream in config.streams.items()},
        )

    def __call__(self, dialogue, ask=False):
        """Raises DataError, which begins with where the dialogue comes from."""
        try:
            prepared = [self.processor(stream)(source) for stream, source in dialogue.media]
        except DataError as error:
            raise DataError(f"{dialogue.where}: {error}") from error
        return self.layout(dialogue, prepared, ask)

    def processor(self, stream):
        if stream not in self.processors:
            raise DataError(
                f"this model takes no media of the kind {stream!r}, only {', '.join(self.processors)}"
            )
        return self.processors[stream]

    @property
    def tiles(self):
        """{stream: Tile}, for batches."""
        return {
            stream: processor.tile(self.layout.streams.index(stream))
            for stream, processor in self.processors.items()
        }

    def outlined(self):
        """The same that only looks at headers."""
        return dataclasses.replace(
            self, processors={stream: processor.outline for stream, processor in self.processors.items()}
        )


def content_parts(text):
    """What a message says: text, or the list of its parts where it shows pictures."""
    if MARK not in text:
        return text
    pieces = re.split(f"({re.escape(MARK)})", text)
    return [
        {"type": "image"} if piece == MARK else {"type": "text", "text": piece} for piece in pieces if piece
    ]


def check_marks(dialogue):
    """Raises DataError unless the text of a Dialogue marks as many pictures as it has; messages need no marks."""
    marks, images = sum(text.count(MARK) for _, text in dialogue.turns), len(dialogue.images)
    if marks != images and (dialogue.marked or marks):
        raise DataError(
            f'{dialogue.where}: the text has {marks} {MARK} {"mark" if marks == 1 else "marks"} but "image" lists {images} '
            f"{'file' if images == 1 else 'files'}. Add the missing file or remove a mark"
        )


def without_marks(text):
    if MARK not in text:
        return text
    return text.replace(MARK + "\n", "").replace("\n" + MARK, "").replace(MARK, "").strip()


def without_breaks(text):
    """Marks without the line break that sets them apart, as LLaVA's data have it."""
    return text.replace(MARK + "\n", MARK).replace("\n" + MARK, MARK).strip() if MARK in text else text
