"""Where everything stands in a sequence.

Compared with the published constants and the published loader, written again; and every refusal.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiny as helpers
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifusion_jax.batch import FEATURE, SPECIAL, TEXT
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.data.dialogues import Dialogue, parse
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError

REAL = Path(__file__).parents[2].parent / "shared/data/omnifusion_1_1"
PROMPT = "This is a dialog with AI assistant.\n"
PROMPT_IDS = [851, 349, 264, 10436, 395, 16107, 13892, 28723, 13]
USER, BOT, SOI, EOI = range(4)
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the released tokenizer is not in {REAL}")
few = settings(max_examples=150)


@pytest.fixture(scope="module")
def real():
    return Tokenizer(REAL)


@functools.cache
def pieces():
    return sentencepiece.SentencePieceProcessor(model_file=str(REAL / "tokenizer.model"))


@pytest.fixture(scope="module")
def tiny():
    return Tokenizer(locate("omnifusion-tiny-decoder"))


def layout(tokenizer, style="omnifusion", rows=4, max_length=2048):
    return helpers.layout(tokenizer, max_length, 4 * round(rows**0.5), 4, layout=style)


def pictures(n, rows=4):
    return [helpers.picture(np.zeros((4 * round(rows**0.5),) * 2 + (3,), np.uint8), 4)] * n


def dialogue(*texts, roles=("human", "gpt"), marked=True, where="chat.json[7]"):
    return Dialogue(
        where, tuple((roles[i % len(roles)], text) for i, text in enumerate(texts)), marked=marked
    )


def showing(talk, n):
    """The same dialogue, with so many pictures beside it."""
    return dataclasses.replace(talk, media=helpers.shown(*["p.png"] * n))


def laid(lay, talk, n, rows=4, ask=False):
    """The Sample of a dialogue with `n` pictures."""
    return lay(showing(talk, n), pictures(n, rows), ask=ask)


def weighted(sample):
    return sample.tokens[sample.weights > 0].tolist()


# --- published constants


@needs_real
@pytest.mark.parametrize("style", ["omnifusion", "original"])
def test_published_positions(real, style):
    lay = layout(real, style, rows=576)
    question = real.encode("What is it?")
    sample = laid(lay, dialogue("What is it?", roles=("user",), marked=False), 1, 576, ask=True)
    assert real.encode(PROMPT) == PROMPT_IDS
    assert len(sample.tokens) == 9 + 578 + 1 + len(question) + 1
    assert sample.tokens[:9].tolist() == PROMPT_IDS
    assert (sample.kind[9], sample.index[9]) == (SPECIAL, SOI)
    assert np.flatnonzero(sample.kind == FEATURE).tolist() == list(range(10, 586))
    assert sample.index[10:586].tolist() == list(range(576))
    assert (sample.kind[586], sample.index[586]) == (SPECIAL, EOI)
    assert (sample.kind[587], sample.index[587]) == (SPECIAL, USER)
    assert sample.tokens[588:-1].tolist() == question
    assert (sample.kind[-1], sample.index[-1]) == (SPECIAL, BOT)
    assert (sample.tokens[sample.kind != TEXT] == real.pad).all() and real.pad == 0 and real.eos == 2
    assert not sample.weights.any()
    assert [a.dtype for a in [*sample[:4], *sample.media["image"]]] == [
        np.int32,
        np.int32,
        np.int32,
        np.float32,
        np.uint8,
    ]
    assert (sample.items, sample.media_positions) == (1, 576)


@needs_real
def test_the_image_mark_is_text_in_original_and_removed_in_omnifusion(real):
    talk = dialogue("<image>\nWhat?", "A cat")
    literal = laid(layout(real, "original"), talk, 1)
    assert literal.tokens[16:22].tolist() == [523, 4075, 28767, 13, 3195, 28804]
    removed = laid(layout(real), talk, 1)
    assert removed.tokens[16 : 16 + len(real.encode("What?"))].tolist() == real.encode("What?")
    after = laid(layout(real), dialogue("What?\n<image>", "A cat"), 1)
    assert after.tokens.tolist() == removed.tokens.tolist()


@needs_real
def test_an_end_of_sequence_typed_as_text_is_one_token(real):
    assert real.encode("</s>") == [2]
    sample = layout(real, "original")(dialogue("Well?", "Yes</s>"), [])
    assert weighted(sample)[-1] == 2 and weighted(sample).count(2) == 1


@needs_real
def test_the_tokenizer_equals_sentencepiece_and_decodes_back(real):
    for text in (
        "Сколько стоит кофе?",
        "Total: 3.50\n\n\tthanks",
        "ёлка 🎄",
        "naïve café",
        "a\u2028b\u00a0c",
    ):
        assert real.encode(text) == pieces().encode(text)
        assert real.decode(real.encode(text)) == text


# --- the published loader


def published(turns, has_image, encode, rows, max_context_len):
    """What the released training code makes of a record, written from its description.

    Returns token ids, loss mask, and what overwrites an embedding where: {position: name}. Pieces are encoded
    one by one, the picture comes first, positions that are not text hold the padding id 0, the mask is on
    whatever turn is not "human", and everything is cut at the right in the end.
    """
    ids, mask, overwritten = list(encode(PROMPT)), [], {}
    mask += [False] * len(ids)
    if has_image:
        overwritten[len(ids)] = "SOI"
        for row in range(rows):
            overwritten[len(ids) + 1 + row] = row
        overwritten[len(ids) + 1 + rows] = "EOI"
        ids, mask = ids + [0] * (rows + 2), mask + [False] * (rows + 2)
    for speaker, text in turns:
        overwritten[len(ids)] = "USER" if speaker == "human" else "BOT"
        piece = list(encode(text))
        ids, mask = [*ids, 0, *piece], [*mask, False, *([speaker != "human"] * len(piece))]
    return (
        ids[:max_context_len],
        mask[:max_context_len],
        {p: name for p, name in overwritten.items() if p < max_context_len},
    )


PHRASES = (
    " ",
    "\n",
    "What is it?",
    "<image>\nWhat?",
    "Сколько здесь яблок?",
    "Жёлтый круг",
    "It costs 3.50,\nI think.",
    "  two  spaces",
    "Да",
    "ok ",
)
texts = st.one_of(st.sampled_from(PHRASES), st.text("abcXYZ 019.,?!\nабвжЁяЫ", min_size=1, max_size=40))


@needs_real
@few
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["human", "gpt", "user", "bard"]), texts), min_size=1, max_size=6
    ),
    has_image=st.booleans(),
    rows=st.sampled_from([1, 36, 576]),
    max_length=st.integers(1, 700),
)
def test_original_is_the_published_loader(real, turns, has_image, rows, max_length):
    ids, mask, overwritten = published(turns, has_image, pieces().encode, rows, max_length)
    talk = Dialogue("x", tuple(turns), marked=True)
    sample = laid(layout(real, "original", rows, max_length), talk, int(has_image), rows)
    assert sample.tokens.tolist() == ids
    assert (sample.weights > 0).tolist() == mask and set(sample.weights.tolist()) <= {0.0, 1.0}
    names = {SPECIAL: {USER: "USER", BOT: "BOT", SOI: "SOI", EOI: "EOI"}, FEATURE: range(rows)}
    assert {
        i: names[k][n] for i, (k, n) in enumerate(zip(sample.kind, sample.index, strict=True)) if k >= SPECIAL
    } == overwritten
    assert not sample.index[sample.kind < SPECIAL].any()


# --- targets


@pytest.mark.parametrize("style", ["omnifusion", "original"])
def test_targets_are_the_answers_and_their_end(tiny, style):
    talk = dialogue("Describe the picture.", "red circle top", "What is written?", "cat")
    sample = layout(tiny, style)(talk, [])
    end = [tiny.eos] if style == "omnifusion" else []
    assert weighted(sample) == [*tiny.encode("red circle top"), *end, *tiny.encode("cat"), *end]
    assert (sample.kind[sample.weights > 0] == TEXT).all()
    assert not (sample.kind == FEATURE).any() and [*sample.index[sample.kind == SPECIAL]] == [
        USER,
        BOT,
        USER,
        BOT,
    ]  # no SOI, no EOI


def test_original_is_cut_on_the_right_after_insertion(tiny):
    talk = dialogue("Describe the picture.", "red circle top")
    whole = laid(layout(tiny, "original", rows=36), talk, 1, 36)
    for length in (3, len(tiny.encode(PROMPT)) + 5, len(whole.tokens) - 1, len(whole.tokens)):
        cut = laid(layout(tiny, "original", rows=36, max_length=length), talk, 1, 36)
        assert [a.tolist() for a in cut[:4]] == [a[:length].tolist() for a in whole[:4]]


def test_original_takes_any_speaker_but_the_human_for_the_assistant(tiny):
    turns = (("bard", "yes"), ("human", "no"), ("user", "what?"), ("gpt", "cat"))
    sample = layout(tiny, "original")(Dialogue("x", turns, marked=True), [])
    assert weighted(sample) == [*tiny.encode("yes"), *tiny.encode("what?"), *tiny.encode("cat")]
    assert [*sample.index[sample.kind == SPECIAL]] == [BOT, USER, BOT, BOT]


def test_original_reads_roles_of_messages_as_everybody_does(tiny):
    """The published loader knows LLaVA's form alone, so that "user" is no more than a name there; with
    messages it is a role.
    """
    lay = layout(tiny, "original")
    sample = lay(Dialogue("x", (("user", "no"), ("assistant", "cat"))), [])
    assert weighted(sample) == tiny.encode("cat") and [*sample.index[sample.kind == SPECIAL]] == [USER, BOT]
    with pytest.raises(DataError, match="turn 0 is from 'bard'; known are human, user"):
        lay(Dialogue("x", (("bard", "no"), ("assistant", "cat"))), [])
    with pytest.raises(
        DataError,
        match=r"turn 0 is from 'system', and layout 'original' has no place for it: .* model.prompt",
    ):
        lay(Dialogue("x", (("system", "no"), ("assistant", "cat"))), [])


def test_original_cuts_what_it_learns_from_but_never_a_question(tiny):
    talk = dialogue("What is it? " * 20, marked=False, roles=("user",))
    assert len(layout(tiny, "original", max_length=30)(talk, []).tokens) == 30
    with pytest.raises(DataError, match="tokens, but max_length is 30"):
        layout(tiny, "original", max_length=30)(talk, [], ask=True)


def test_the_words_before_an_answer_stand_only_before_one(tiny):
    """Layout "text": a user who speaks twice is answered once."""
    lay = helpers.layout(tiny, 512, layout="text", user="User:", bot="AI:", prompt="")
    talk = Dialogue("x", (("user", "red"), ("user", "circle"), ("assistant", "cat"), ("user", "star")))
    pieces = ["User:red", "User:circleAI:", "cat", "User:star"]
    ids = [tiny.encode(piece) for piece in pieces]
    asked = lay(talk, [], ask=True)
    assert asked.tokens.tolist() == [*ids[0], *ids[1], *ids[2], tiny.eos, *tiny.encode("User:starAI:")]
    assert lay(talk, []).tokens.tolist() == [*ids[0], *ids[1], *ids[2], tiny.eos, *ids[3]]


@pytest.mark.parametrize("style", ["omnifusion", "original"])
def test_a_request_repeats_what_training_read(tiny, style):
    """What `messages` makes of a record is laid out, as a request, as the record itself is."""
    lay, record = (
        layout(tiny, style),
        dialogue("<image>\nWhat is it?", " red ", "Why?\n<image>" if style == "original" else "Why?"),
    )
    again = Dialogue("x", tuple((m["role"], m["content"]) for m in lay.messages(showing(record, 1))))
    asked, taught = (
        laid(lay, again, 1, ask=True),
        laid(lay, dialogue(*[text for _, text in record.turns], "cat"), 1),
    )
    n = len(asked.tokens)
    assert (
        asked.tokens.tolist() == taught.tokens[:n].tolist()
        and asked.index.tolist() == taught.index[:n].tolist()
    )
    assert (taught.weights[n:] > 0).any()


def test_parts_and_marks_together_are_refused(tiny):
    marked = {"type": "text", "text": "<image> What?"}
    message = r"^x: media stand as parts, and the text has marks of its own \(<image>\)\. Remove the marks"
    for turns in (
        [[{"type": "image"}, marked]],
        [[{"type": "image"}], [marked]],
        [[{"type": "image"}], marked["text"]],
    ):
        record = {"messages": [{"role": "user", "content": content} for content in turns], "images": ["a"]}
        with pytest.raises(DataError, match=message):
            parse(record, "x")
    alone = parse(
        {"messages": [{"role": "user", "content": [marked]}], "images": ["a"]}, "x"
    )  # in words after all
    assert (laid(layout(tiny), alone, 1, ask=True).kind == FEATURE).sum() == 4


def in_parts(*shows):
    """Questions and answers of one text part each; turn i shows a picture where `shows[i]`."""
    content = [[{"type": "text", "text": "Why?"}, *[{"type": "image"}] * shown] for shown in shows]
    turns = [{"role": ("user", "assistant")[i % 2], "content": parts} for i, parts in enumerate(content)]
    return parse({"messages": turns, "images": ["a"]}, "chat.json[7]")


def test_original_has_no_place_for_a_picture_of_a_later_turn(tiny):
    lay = layout(tiny, "original")
    message = (
        r"^chat\.json\[7\]: turn 2 shows a picture, "
        r"but layout 'original' shows it before the first turn\. Move it there"
    )
    with pytest.raises(DataError, match=message):
        lay(in_parts(False, False, True), pictures(1), ask=True)
    assert (lay(in_parts(True, False, False), pictures(1), ask=True).kind == FEATURE).sum() == 4


@pytest.mark.parametrize("style", ["omnifusion", "text"])
def test_a_picture_of_any_turn_stands_before_the_first(tiny, style):
    """Where the layout has one place for pictures; what is said stays as it is."""
    first, later = (
        layout(tiny, style)(in_parts(*shows), pictures(1), ask=True)
        for shows in ((True, False, False), (False, False, True))
    )
    assert [a.tolist() for a in later[:4]] == [a.tolist() for a in first[:4]] and (
        first.kind == FEATURE
    ).sum() == 4


def test_messages_need_no_mark_but_may_have_one(tiny):
    lay = layout(tiny)
    plain, marked = (
        laid(lay, dialogue(text, "yes", roles=("user", "assistant"), marked=False), 1)
        for text in ("Why?", "<image>\nWhy?")
    )
    assert plain.tokens.tolist() == marked.tokens.tolist()


speakers = st.sampled_from(["human", "gpt", "user", "assistant", "system"])
any_text = st.one_of(
    st.sampled_from(["", " ", "<image>", "<image>\n", "<image>\nWhat?", "red circle", "Что здесь?"]),
    st.text(max_size=12),
)


@few
@given(
    turns=st.lists(st.tuples(speakers, any_text), min_size=1, max_size=4),
    images=st.integers(0, 2),
    marked=st.booleans(),
    max_length=st.integers(1, 80),
)
def test_omnifusion_never_gives_a_sample_without_targets(tiny, turns, images, marked, max_length):
    try:
        sample = laid(
            layout(tiny, max_length=max_length), Dialogue("here", tuple(turns), marked=marked), images
        )
    except DataError as error:
        assert str(error).startswith("here: ")
        return
    targets = np.flatnonzero(sample.weights)
    assert len(targets) and targets[0] > 0 and sample.tokens[targets[-1]] == tiny.eos
    assert len({len(column) for column in sample[:4]}) == 1 and len(sample.tokens) <= max_length


# --- refusals: where, what, and what to do

MARKS = "Add the missing file or remove a mark"
REFUSED = {
    "two marks, one picture": (
        dialogue("<image>\n<image>\nWhat?", "yes"),
        1,
        False,
        ["2 <image> marks", "lists 1 file.", MARKS],
    ),
    "a mark, no picture": (
        dialogue("<image>\nWhat?", "yes"),
        0,
        False,
        ["1 <image> mark ", "lists 0 files.", MARKS],
    ),
    "a picture, no mark": (dialogue("What?", "yes"), 1, False, ["0 <image> marks", "lists 1 file.", MARKS]),
    "a mark in messages, no picture": (
        dialogue("<image> What?", "yes", marked=False),
        0,
        False,
        ["1 <image> mark ", MARKS],
    ),
    "an empty turn": (
        dialogue("What?", ""),
        0,
        False,
        ["turn 1 is empty", "Remove the turn or write its text"],
    ),
    "a blank turn": (dialogue(" \n", "yes"), 0, False, ["turn 0 is empty"]),
    "nothing but a mark": (
        dialogue("<image>\n", "yes"),
        1,
        False,
        ["turn 0 holds nothing but <image>", "Write its text"],
    ),
    "the assistant first": (
        dialogue("Hello", "Hi", roles=("gpt", "human")),
        0,
        False,
        ["starts with the assistant", "must be the user's"],
    ),
    "an unknown role": (
        dialogue("Be good", "Hi", roles=("bard", "user")),
        0,
        False,
        ["turn 0", "'bard'", "human, user, gpt, assistant"],
    ),
    "a system": (
        dialogue("Be good", "Hi", roles=("system", "user")),
        0,
        False,
        ["turn 0 is from 'system'", "no place", "belongs in model.prompt"],
    ),
    "no answer": (dialogue("Hello"), 0, False, ["no turn of the assistant", "Add an answer"]),
    "an answer to answer": (
        dialogue("Hello", "Hi"),
        0,
        True,
        ["last turn is the assistant's", "End with a question"],
    ),
    "too long": (
        dialogue("Hello " * 3000, "Hi"),
        0,
        False,
        ["tokens, but max_length is 2048", "Shorten", "data.max_length"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tiny, case):
    talk, images, ask, words = REFUSED[case]
    with pytest.raises(DataError) as caught:
        laid(layout(tiny), talk, images, ask=ask)
    text = str(caught.value)
    assert text.startswith("chat.json[7]: ") and all(word in text for word in words), text


TWO = (
    dialogue("<image><image>\nWhat?", "yes"),
    2,
    False,
    ["2 pictures", "layout 'original' has place for one", "Give one picture a dialogue"],
)
UNREAD = {"two pictures": TWO, **{name: REFUSED[name] for name in ("an empty turn", "an answer to answer")}}


@pytest.mark.parametrize("case", UNREAD)
def test_original_refuses_what_the_published_loader_cannot_read(tiny, case):
    talk, images, ask, words = UNREAD[case]
    with pytest.raises(DataError) as caught:
        laid(layout(tiny, "original"), talk, images, ask=ask)
    assert all(word in str(caught.value) for word in words)


# --- the tokenizer's own files


def test_a_broken_tokenizer_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json is missing: a tokenizer directory holds"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(tmp_path)


def test_a_vocabulary_may_have_rows_to_spare_but_none_too_few(tiny):
    assert tiny.for_vocabulary(tiny.vocab) is tiny and tiny.for_vocabulary(tiny.vocab + 1) is tiny
    with pytest.raises(
        DataError,
        match=f"has {tiny.vocab} tokens, model.decoder.vocab is {tiny.vocab - 1}: they belong to two models",
    ):
        tiny.for_vocabulary(tiny.vocab - 1)


def test_a_token_that_the_vocabulary_lacks_is_named(tmp_path, tiny):
    (tmp_path / "tokenizer.json").write_bytes((tiny.directory / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(DataError, match=r"tokenizer\.json does not know the eos_token '<\|end\|>'"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ')
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "unk_token": null}')
    assert (Tokenizer(tmp_path).eos, Tokenizer(tmp_path).pad) == (tiny.eos, tiny.pad)
