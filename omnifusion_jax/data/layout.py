"""Lays dialogues out: what stands where in a sequence.

    omnifusion  prompt | SOI | image features | EOI | USER | text | BOT | answer </s> | USER | text | ...
    original    the same, as the published loader has it
    text        prompt | SOI | image features | EOI | "User:" text "AI:" | answer </s> | ...
    template    what the model's chat template writes, with image features where it marks a picture

Each media item has its own SOI to EOI, before the first turn or, with model.image_place=mark, where the text
marks it. USER, BOT, SOI and EOI are trained vectors, not tokens. Every piece of text is encoded on its own
and without a beginning-of-sequence token, except in "template", where all text is one piece.
"""

import bisect
import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np

from omnifusion_jax.batch import FEATURE, INSTEAD, SPECIAL, TEXT, UNKNOWN, Sample, Tile
from omnifusion_jax.config.base import check
from omnifusion_jax.data.chat_template import Template
from omnifusion_jax.data.dialogues import ROLES, Dialogue
from omnifusion_jax.data.features import FeatureProcessor
from omnifusion_jax.data.modality import (
    Prepared,
    check_marks,
    content_parts,
    marked,
    pieces,
    without_breaks,
    without_marks,
)
from omnifusion_jax.data.pairs import pair
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import LAYOUTS, MODALITIES

ANSWER = "assistant"


class Style(NamedTuple):
    """A row of LAYOUTS."""

    vectors: tuple[str, ...]  # names of its trained vectors
    # (Layout, Dialogue, turns, each media item as Placed, ask) -> pieces of the sequence, each of them
    # (tokens, kind, index, weights) as `Layout.text`, `Layout.special` and `Layout.features` make them
    arrange: Callable


class Placed(NamedTuple):
    """A media item as a layout puts it into a sequence."""

    features: tuple[np.ndarray, ...]  # (tokens, kind, index, weights), [positions] each
    media: Prepared

    @property
    def parts(self):
        """The features in parts between which there may be text, see Prepared."""
        return list(zip(*(np.split(column, self.media.parts) for column in self.features), strict=True))


class Layout:
    """Lays dialogues out in the way that `config.layout` names.

    "original" takes one picture, and text as it is: a literal "<image>" is text, and so is white space. In
    LLaVA's form, the only one that the published loader knows, every speaker but "human" is the assistant. No
    end-of-sequence token follows an answer, a target that the tokenizer does not know adds nothing to the
    loss, and a sequence longer than `max_length` is cut off.

    The other layouts count the marks of LLaVA data, and remove them or put media in their place. An
    end-of-sequence token follows every answer and is a target. A dialogue that is too long, starts with the
    assistant or has no answer to learn from raises DataError. Only "template" has a place for a system's
    turn.
    """

    def __init__(
        self, tokenizer, config, max_length: int, cut: bool = False, vectors: Sequence[str] | None = None
    ):
        """Makes the layout of a ModelConfig.

        Args:
          max_length: tokens that a dialogue may have.
          cut: a dialogue that is too long is cut after the last answer that fits, not refused.
          vectors: names of the model's trained vectors, if they are not those of `config`.

        Raises:
          ConfigError: the layout needs other vectors than the model has.
        """
        # It keeps only what it needs of the config, because worker processes do without JAX.
        self.tokenizer, self.max_length, self.cut = tokenizer, max_length, cut
        self.name, self.vectors, self.streams = config.layout, config.special, tuple(config.streams)
        if vectors is not None:
            missing = ", ".join(name for name in self.vectors if name not in vectors)
            check(not missing, f"layout {self.name!r} needs vectors that the model does not have: {missing}")
            self.vectors = vectors
        self.user, self.bot, self.placed = config.user, config.bot, config.image_place == "mark"
        self.original = config.layout == "original"
        self.prompt = tokenizer.encode(config.prompt)
        self.template = None
        if config.layout == "template":
            tokens = {name: stream.token for name, stream in config.streams.items()}
            self.template = Template(config.template, tokens, tokenizer, config.labels)
        # whether media stand among the text, where it marks them, and not before the first turn
        self.interleaved = self.placed or self.template is not None

    def __call__(self, dialogue: Dialogue, prepared: Sequence[Prepared], ask: bool = False) -> Sample:
        """The Sample of a dialogue and its prepared media.

        Args:
          prepared: one for each of `dialogue.media`.
          ask: the dialogue ends with a question, and the sequence where the model's answer begins.

        Raises:
          DataError: the dialogue does not suit this layout, or is too long.
        """
        sample = self.sample(dialogue, prepared, ask)
        n = len(sample.tokens)
        if n <= self.max_length:
            return sample
        if self.original and not ask:
            return Sample(*(column[: self.max_length] for column in sample[:4]), *sample[4:])
        shorter = self.shortened(dialogue, prepared) if self.cut and not ask else None
        if shorter is None:
            advice = "Shorten or split the dialogue, or raise max_length (data.max_length in training)"
            raise DataError(
                f"{dialogue.where}: {n} tokens, but max_length is {self.max_length}. {advice}", "too_long"
            )
        return shorter

    def shortened(self, dialogue, prepared):
        """The Sample of as many first turns as fit and end with an answer, or None if the first does not fit.

        Media that the text marks in a turn left out are left out too.
        """
        any_marks = any(marked(text) for _, text in dialogue.turns)

        def first(count):
            turns = dialogue.turns[:count]
            items = sum(len(marked(text)) for _, text in turns) if any_marks else len(prepared)
            part = dataclasses.replace(dialogue, turns=turns, media=dialogue.media[:items])
            return self.sample(part, prepared[:items], ask=False)

        answers = [i for i, (role, _) in enumerate(dialogue.turns, 1) if ROLES[role] == ANSWER]
        too_long = lambda count: len(first(count).tokens) > self.max_length
        fitting = bisect.bisect_left(answers, True, key=too_long)
        if not fitting:
            return None
        kept = answers[fitting - 1]
        return first(kept)._replace(cut=len(dialogue.turns) - kept)

    def sample(self, dialogue, prepared, ask):
        """The Sample of a dialogue of any length."""
        turns = self.check(dialogue, len(prepared), ask)
        items = list(zip(dialogue.media, prepared, strict=True))
        if not self.interleaved:  # before the first turn they stand stream by stream
            items.sort(key=lambda item: self.streams.index(item[0].stream))
        placed = [Placed(a, one) for a, (_, one) in zip(self.features(items), items, strict=True)]
        parts = LAYOUTS[self.name].arrange(self, dialogue, turns, placed, ask)
        tokens, kind, index, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
        views = {}  # {stream: views of each item}
        for (stream, _), one in items:
            views.setdefault(stream, []).append(one.views)
        media = {stream: tuple(map(joined, zip(*of, strict=True))) for stream, of in views.items()}
        media_positions = sum(len(one.order) for one in prepared)
        return Sample(tokens, kind, index, weights, media, len(prepared), media_positions)

    def in_vectors(self, dialogue, turns, media, ask):
        """Pieces of a sequence in which trained vectors mark the speakers."""
        rest = iter(media)
        yield from self.opening(rest)
        for role, text in turns:
            if role == ANSWER:
                yield self.special("bot")
                yield self.answer(text)
            else:
                yield self.special("user")
                yield from self.among(text, rest)
        if ask:
            yield self.special("bot")

    def in_words(self, dialogue, turns, media, ask):
        """Pieces of a sequence in which words, `user` and `bot`, mark the speakers."""
        rest = iter(media)
        yield from self.opening(rest)
        for i, (role, text) in enumerate(turns):
            if role == ANSWER:
                yield self.answer(text)
            else:
                answered = ask if i + 1 == len(turns) else turns[i + 1][0] == ANSWER
                yield from self.among(self.user + text + (self.bot if answered else ""), rest)

    def in_template(self, dialogue, turns, media, ask):
        """Pieces of a sequence that a chat template writes, with features in place of its image tokens."""
        rendered = self.template(turns, ask, dialogue.where, [item.media.grid for item in media])
        ids = rendered.ids
        here = np.flatnonzero(np.isin(ids, list(self.template.ids)))
        written = [self.template.ids[i] for i in ids[here].tolist()]
        runs = [
            (of.stream, run) for of, item in zip(dialogue.media, media, strict=True) for run in item.parts
        ]
        given = [stream for stream, _ in runs]
        if written != given:
            more = len(written) > len(given)
            token = " or ".join(self.template.by_mark.values())
            hint = f". Remove {token} from the text of its turns, where it stands for media" if more else ""
            raise DataError(
                f"{dialogue.where}: the chat template shows {counted(written)}, "
                f"the dialogue has {counted(given)}{hint}",
                "marks",
            )
        ends = [*here, len(ids)]
        yield self.rendered(rendered, slice(ends[0]))
        for (_, features), start, end in zip(runs, ends, ends[1:], strict=False):
            yield features
            yield self.rendered(rendered, slice(start + 1, end))

    def rendered(self, found, here):
        """A slice of what a template wrote."""
        ids, weights, targets = (column[here] for column in found)
        tokens, kind, index, weights = self.text(ids, weights)
        other = targets >= 0
        return tokens, np.where(other, INSTEAD, kind), np.where(other, targets, index), weights

    def opening(self, media):
        """The prompt, and all media unless they stand at their marks."""
        yield self.text(self.prompt)
        if not self.interleaved:
            for item in media:
                yield from self.enclosed(item)

    def among(self, text, media):
        """A turn of the user, with the next media item at each of its marks."""
        texts = pieces(text)[::2] if self.interleaved else [text]
        for i, piece in enumerate(texts):
            if i:
                yield from self.enclosed(next(media))
            if piece or not i:
                yield self.text(self.tokenizer.encode(piece))

    def enclosed(self, item):
        """The features of a media item between SOI and EOI."""
        yield from (self.special("soi"), item.features, self.special("eoi"))

    def answer(self, text):
        """An answer, whose tokens are targets."""
        ids = self.tokenizer.encode(text)
        if not self.original:
            return self.text([*ids, self.tokenizer.eos], weight=1.0)
        tokens, kind, index, weights = self.text(ids, weight=1.0)
        return tokens, np.where(tokens == self.tokenizer.unk, UNKNOWN, kind).astype(np.int32), index, weights

    def text(self, ids, weight=0.0):
        """Text as (tokens, kind, index, weights), each [n]; `weight` is that of its tokens as targets."""
        n = len(ids)
        return (
            np.array(ids, np.int32),
            np.full(n, TEXT, np.int32),
            np.zeros(n, np.int32),
            np.broadcast_to(np.float32(weight), n),
        )

    def special(self, name):
        """A trained vector as (tokens, kind, index, weights), each [1]."""
        index = self.vectors.index(name)
        return (
            np.array([self.tokenizer.pad], np.int32),
            np.array([SPECIAL], np.int32),
            np.array([index], np.int32),
            np.zeros(1, np.float32),
        )

    def features(self, items):
        """Yields (tokens, kind, index, weights) of each (Media, Prepared).

        Feature rows are numbered through all items of a stream.
        """
        first = collections.Counter()  # {stream: feature rows of the items before}
        for (stream, _), one in items:
            n, newline = len(one.order), one.order < 0
            index = one.order + np.int32(first[stream])
            if newline.any():
                index[newline] = self.vectors.index("newline")
            kind = np.where(newline, SPECIAL, FEATURE + self.streams.index(stream)).astype(np.int32)
            yield np.full(n, self.tokenizer.pad, np.int32), kind, index, np.zeros(n, np.float32)
            first[stream] += one.rows

    def read(self, dialogue):
        """The turns as this layout takes them: ("user", "assistant" or "system", text). Raises DataError."""
        if self.original and dialogue.marked:
            return [("user" if role == "human" else ANSWER, text) for role, text in dialogue.turns]
        for i, (role, _) in enumerate(dialogue.turns):
            if role not in ROLES:
                raise DataError(
                    f"{dialogue.where}: turn {i} is from {role!r}; known are {', '.join(ROLES)}", "speaker"
                )
            if role == "system" and self.template is None:
                place = f"layout {self.name!r} has no place for it: what it says belongs in model.prompt"
                raise DataError(f"{dialogue.where}: turn {i} is from 'system', and {place}", "speaker")
        return [(ROLES[role], self.words(text, dialogue)) for role, text in dialogue.turns]

    def words(self, text, dialogue):
        """A turn's text, with its marks if this layout puts media there, and without them otherwise.

        "original" keeps a literal mark, unless it stands for a part of a message's content.
        """
        if self.interleaved:
            return without_breaks(text)
        return text if self.original and not dialogue.parted else without_marks(text)

    def with_marks(self, dialogue):
        """The dialogue with a mark for each media item.

        If its text has no marks, they are put before the text of the first turn that is not the system's.
        """
        if self.original or not dialogue.media or any(marked(text) for _, text in dialogue.turns):
            return dialogue
        first = next((i for i, (role, _) in enumerate(dialogue.turns) if role != "system"), 0)
        marks = "".join(MODALITIES[media.stream].mark + "\n" for media in dialogue.media)
        turns = [
            (role, marks + text if i == first else text) for i, (role, text) in enumerate(dialogue.turns)
        ]
        return dataclasses.replace(dialogue, turns=tuple(turns))

    def messages(self, dialogue: Dialogue) -> list[dict]:
        """The turns as `messages` of a Request: a model is asked in the words that it was trained with.

        Raises:
          DataError: the turns do not suit this layout.
        """
        if not self.original:
            check_marks(dialogue, self.interleaved)
        if not self.interleaved:
            return [{"role": role, "content": text} for role, text in self.read(dialogue)]
        found = self.read(self.with_marks(dialogue))
        return [
            {"role": role, "content": content_parts(text) if marked(text) else text} for role, text in found
        ]

    def check(self, dialogue, items, ask):
        """The turns as `read` gives them, if they can be laid out. Raises DataError if not."""
        where = dialogue.where
        if self.original and items > 1:
            raise DataError(
                f"{where}: {items} pictures, but layout 'original' has place for one. "
                "Give one picture a dialogue, or another model.layout",
                "marks",
            )
        for i, (_, text) in enumerate(dialogue.turns):
            if not (text if self.original else text.strip()):
                raise DataError(
                    f"{where}: turn {i} is empty. Remove the turn or write its text", "empty_turn"
                )
        if not self.original:
            check_marks(dialogue, self.interleaved)
        elif dialogue.parted:
            later = [i for i, (_, text) in enumerate(dialogue.turns) if i and marked(text)]
            if later:
                raise DataError(
                    f"{where}: turn {later[0]} shows a picture, but layout 'original' shows it before the "
                    "first turn. Move it there",
                    "marks",
                )
        turns = self.read(self.with_marks(dialogue) if self.interleaved else dialogue)
        spoken = [role for role, _ in turns if role != "system"]
        if ask and spoken[-1:] != ["user"]:
            last = spoken[-1] if spoken else "system"
            raise DataError(f"{where}: the last turn is the {last}'s. End with a question", "order")
        if self.original:
            return turns
        if spoken[:1] == [ANSWER]:
            raise DataError(
                f"{where}: the dialogue starts with the assistant. The first turn must be the user's", "order"
            )
        if not ask and ANSWER not in spoken:
            raise DataError(
                f"{where}: no turn of the assistant, hence nothing to learn from. "
                "Add an answer or remove the dialogue",
                "no_answer",
            )
        for i, (role, text) in enumerate(turns):
            if not without_marks(text):
                mark = marked(dialogue.turns[i][1])[0]
                raise DataError(f"{where}: turn {i} holds nothing but {mark}. Write its text", "empty_turn")
            if self.placed and role == ANSWER and marked(text):
                raise DataError(
                    f"{where}: turn {i} is the assistant's and shows a picture. "
                    "Move it to a turn of the user",
                    "marks",
                )
        return turns


VECTORS = ("user", "bot", "soi", "eoi")
LAYOUTS["omnifusion"] = Style(VECTORS, Layout.in_vectors)
LAYOUTS["original"] = Style(VECTORS, Layout.in_vectors)  # the published loader to the letter
LAYOUTS["text"] = Style(("soi", "eoi"), Layout.in_words)
LAYOUTS["template"] = Style((), Layout.in_template)


@dataclasses.dataclass
class Prepare:
    """Turns a Dialogue into a Sample: `processors` prepare its media, `layout` makes the sequence."""

    layout: Layout
    processors: dict[str, Callable[..., Prepared]]  # by stream, such as an ImageProcessor
    # of a dialogue with two answers lays out both (data/pairs.py); else the chosen one alone
    pairs: bool = False

    @classmethod
    def of(
        cls,
        tokenizer,
        config,
        max_length: int,
        cut=False,
        vectors=None,
        features=None,
        pairs=False,
        **settings,
    ) -> Self:
        """The Prepare of a ModelConfig; arguments as in Layout, `settings` go to every stream's processor.

        `features`: what made features of all media, as data.features has it; None: media are what they are.
        """
        layout = Layout(tokenizer, config, max_length, cut, vectors)
        processors = {
            name: MODALITIES[name].processor.of(c, **settings) for name, c in config.streams.items()
        }
        if features:
            processors = {name: FeatureProcessor.of(p, features, name) for name, p in processors.items()}
        return cls(layout, processors, pairs)

    def __call__(self, dialogue: Dialogue, ask: bool = False) -> Sample:
        """The Sample of a dialogue, or of a pair; `ask` as in Layout.

        Raises:
          DataError: the dialogue or its media cannot be used; the message begins with `dialogue.where`.
        """
        prepared = self.media(dialogue)
        return pair(self.layout, dialogue, prepared) if self.pairs else self.layout(dialogue, prepared, ask)

    def media(self, dialogue: Dialogue) -> list[Prepared]:
        """The media of a dialogue, prepared. Raises DataError as a call does."""
        try:
            return [self.processor(stream)(source) for stream, source in dialogue.media]
        except DataError as error:
            raise error.at(dialogue.where) from error

    def processor(self, stream: str) -> Callable[..., Prepared]:
        """What prepares the media of a stream. Raises DataError for a stream that the model does not have."""
        if stream not in self.processors:
            raise DataError(
                f"this model takes no media of the kind {stream!r}, only {', '.join(self.processors)}",
                "media",
            )
        return self.processors[stream]

    @property
    def tiles(self) -> dict[str, Tile]:
        """{stream: Tile}, which `batch.collate` needs."""
        return {
            stream: processor.tile(self.layout.streams.index(stream))
            for stream, processor in self.processors.items()
        }

    def outlined(self) -> Self:
        """A Prepare that reads only the headers of media, so that its Samples have tiles without pixels."""
        return dataclasses.replace(
            self, processors={stream: processor.outline for stream, processor in self.processors.items()}
        )


def joined(arrays):
    """Arrays one after the other; one alone is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def counted(streams):
    """Media items in words: "2 x image, 1 x audio"."""
    counts = collections.Counter(streams)
    return ", ".join(f"{count} x {stream}" for stream, count in counts.items()) or "no media"
