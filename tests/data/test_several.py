"""Several pictures in a dialogue: where every feature row of each stands, by hand, in every layout."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.batch import FEATURE, SPECIAL, TEXT, UNKNOWN
from omnifusion_jax.config import EncoderConfig, ImageConfig, ModelConfig
from omnifusion_jax.data.dialogues import Dialogue, Media, Request, from_request
from omnifusion_jax.data.layout import Layout, Prepare
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError

PARTED = "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
PARTED += "{{ '<image>' if p.type == 'image' else p.text }}{% endfor %}"
PARTED += "{{ eos_token if m.role == 'assistant' }}{% endfor %}{{ '[assistant]' if add_generation_prompt }}"
STYLES = {
    "omnifusion": {"layout": "omnifusion"},
    "omnifusion, marked": {"layout": "omnifusion", "image_place": "mark"},
    "text": {"layout": "text"},
    "text, marked": {"layout": "text", "image_place": "mark"},
    "template": {"layout": "template", "template": PARTED, "prompt": ""},
}
FIRST = [("image", i) for i in range(4)]  # rows of the first picture of four patches
SECOND = [("image", i) for i in range(4, 8)]
THIRD = [("image", i) for i in range(8, 12)]


@pytest.fixture
def tokenizer(tmp_path):
    return tiny.make_tokenizer(tmp_path)


def layout(tokenizer, style):
    return tiny.layout(tokenizer, 512, 32, **STYLES[style])


def colours(n, size=32):
    """Pictures that are known by their colour: 10, 20, and so on."""
    return [np.full((size, size, 3), 10 * (i + 1), np.uint8) for i in range(n)]


def talk(*texts, pictures):
    turns = tuple((("human", "gpt")[i % 2], text) for i, text in enumerate(texts))
    return Dialogue("chat.json[7]", turns, tiny.shown(*colours(pictures)), marked=True)


def laid(lay, dialogue, ask=False):
    return lay(dialogue, [tiny.picture(pixels) for pixels in dialogue.images], ask=ask)


def spelled(lay, sample):
    """What stands at each position: a token, a vector's name, ("image", row)."""
    assert all(len(column) == len(sample.tokens) for column in sample[:4])
    assert (sample.tokens[sample.kind >= SPECIAL] == lay.tokenizer.pad).all()
    assert not sample.index[sample.kind == TEXT].any()
    names = {
        TEXT: lambda token, i: int(token),
        SPECIAL: lambda token, i: lay.vectors[i],
        FEATURE: lambda token, i: ("image", int(i)),
    }
    return [names[kind](token, i) for token, kind, i in zip(*sample[:3], strict=True)]


LIKE = talk("Is <image> like <image>?", "Yes.", "And like\n<image>", "No.", pictures=3)


def test_before_the_first_turn_they_stand_in_order(tokenizer):
    lay, e = layout(tokenizer, "omnifusion"), tokenizer.encode
    sample = laid(lay, talk("<image>\n<image>\nWhat?", "A cat.", pictures=2))
    asked = [*e(tiny.PROMPT), "soi", *FIRST, "eoi", "soi", *SECOND, "eoi", "user", *e("What?"), "bot"]
    answer = [*e("A cat."), tokenizer.eos]
    assert spelled(lay, sample) == [*asked, *answer]
    assert (sample.items, sample.media_positions) == (2, 8)
    assert sample.weights.tolist() == [0.0] * len(asked) + [1.0] * len(answer)
    (view,) = sample.media["image"]
    assert view.shape == (2, 32, 32, 3) and view[:, 0, 0, 0].tolist() == [10, 20]
    opening = [*e(tiny.PROMPT), *(slot for rows in (FIRST, SECOND, THIRD) for slot in ("soi", *rows, "eoi"))]
    turns = [
        "user",
        *e("Is  like ?"),
        "bot",
        *e("Yes."),
        tokenizer.eos,
        "user",
        *e("And like"),
        "bot",
        *e("No."),
        tokenizer.eos,
    ]
    assert spelled(lay, laid(lay, LIKE)) == [*opening, *turns]


def test_at_their_marks_every_piece_of_text_is_encoded_alone(tokenizer):
    lay, e = layout(tokenizer, "omnifusion, marked"), tokenizer.encode
    assert spelled(lay, laid(lay, LIKE)) == [
        *e(tiny.PROMPT),
        *("user", *e("Is "), "soi", *FIRST, "eoi", *e(" like "), "soi", *SECOND, "eoi", *e("?")),
        *("bot", *e("Yes."), tokenizer.eos),
        *("user", *e("And like"), "soi", *THIRD, "eoi"),
        *("bot", *e("No."), tokenizer.eos),
    ]
    first = talk("<image>\n<image>\nWhat?", "A cat.", pictures=2)
    pictures = ["soi", *FIRST, "eoi", "soi", *SECOND, "eoi"]
    start = [*e(tiny.PROMPT), "user", *pictures, *e("What?"), "bot"]
    assert spelled(lay, laid(lay, first)) == [*start, *e("A cat."), tokenizer.eos]
    beside = tiny.dialogue((("user", "What?"),), *colours(2))  # a request without marks
    assert spelled(lay, laid(lay, beside, ask=True)) == start


def test_in_words(tokenizer):
    e, eos = tokenizer.encode, tokenizer.eos
    lay = layout(tokenizer, "text")
    opening = [*e(tiny.PROMPT), *(slot for rows in (FIRST, SECOND, THIRD) for slot in ("soi", *rows, "eoi"))]
    turns = [*e("User:Is  like ?AI:"), *e("Yes."), eos, *e("User:And likeAI:"), *e("No."), eos]
    assert spelled(lay, laid(lay, LIKE)) == [*opening, *turns]
    lay = layout(tokenizer, "text, marked")
    assert spelled(lay, laid(lay, LIKE)) == [
        *e(tiny.PROMPT),
        *(*e("User:Is "), "soi", *FIRST, "eoi", *e(" like "), "soi", *SECOND, "eoi", *e("?AI:")),
        *(*e("Yes."), eos),
        *(*e("User:And like"), "soi", *THIRD, "eoi", *e("AI:")),
        *(*e("No."), eos),
    ]


def test_where_the_template_marks_them(tokenizer):
    """All text is encoded in one go, and each mark gives way to the rows of its picture."""
    lay = layout(tokenizer, "template")
    written = "[user]Is <image> like <image>?[assistant]Yes.</s>[user]And like<image>[assistant]No.</s>"
    ids, rest = tokenizer.encode(written), iter((FIRST, SECOND, THIRD))
    (image_id,) = lay.template.ids
    assert ids.count(image_id) == 3
    expected = [slot for token in ids for slot in (next(rest) if token == image_id else [token])]
    sample = laid(lay, LIKE)
    assert spelled(lay, sample) == expected
    answers = sample.tokens[sample.weights > 0].tolist()
    assert tokenizer.decode(answers) == "Yes.No." and answers.count(tokenizer.eos) == 2
    assert (sample.items, sample.media_positions) == (3, 12)


GRID = ImageConfig((EncoderConfig(image_size=32, patch=16),), fit="tiles")
WIDE, LARGE = (
    Image.new("RGB", (64, 32)),
    Image.new("RGB", (64, 64)),
)  # of 1 x 2 and 2 x 2 tiles, and the whole: 3 and 5 parts
ENDED = [  # patches of each line of the grid across its tiles, and the end of the line
    *([0, 1, 2, 3], [4, 5, 8, 9, "newline"], [6, 7, 10, 11, "newline"]),
    [12, 13, 14, 15],
    *(
        [16, 17, 20, 21, "newline"],
        [18, 19, 22, 23, "newline"],
        [24, 25, 28, 29, "newline"],
        [26, 27, 30, 31, "newline"],
    ),
]


@pytest.mark.parametrize("place", ["prefix", "mark"])
@pytest.mark.parametrize("newline", [False, True])
def test_rows_of_tiles_are_counted_on_from_picture_to_picture(tokenizer, newline, place):
    c, e = ModelConfig(image=dataclasses.replace(GRID, newline=newline), image_place=place), tokenizer.encode
    prepare = Prepare.of(tokenizer, c, 512)
    turns = ("human", "<image>\nLike <image>"), ("gpt", "No.")
    sample = prepare(Dialogue("x", turns, tiny.shown(WIDE, LARGE), marked=True))
    flat = lambda lines: [row if row == "newline" else ("image", row) for line in lines for row in line]
    lines = (ENDED[:3], ENDED[3:]) if newline else ([range(12)], [range(12, 32)])
    wide, large = (["soi", *flat(some), "eoi"] for some in lines)
    asked = ["user", *wide, *e("Like "), *large] if place == "mark" else [*wide, *large, "user", *e("Like")]
    assert spelled(prepare.layout, sample) == [*e(tiny.PROMPT), *asked, "bot", *e("No."), tokenizer.eos]
    assert len(sample.media["image"][0]) == 3 + 5 and (sample.items, sample.media_positions) == (
        2,
        32 + 6 * newline,
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("first", ["Is <image> like <image>?", "Are <image> <image> alike?"])
def test_a_request_shows_them_as_training_did(tokenizer, style, first):
    """The record's own words as a Request's messages, through JSON; pictures are parts or stand beside."""
    lay = layout(tokenizer, style)
    record = talk(first, "Yes.", "And like\n<image>", pictures=3)
    whole = talk(first, "Yes.", "And like\n<image>", "No.", pictures=3)
    messages = json.loads(json.dumps(lay.messages(record)))
    request = from_request(Request(messages, list(record.images)))
    assert request.parted == (style not in ("omnifusion", "text"))
    asked, taught = laid(lay, request, ask=True), laid(lay, whole)
    n = len(asked.tokens)
    assert spelled(lay, asked) == spelled(lay, laid(lay, record, ask=True)) == spelled(lay, taught)[:n]
    assert (taught.weights[n:] > 0).any()


WRONG = {
    "a mark too many": (
        "omnifusion",
        talk("<image> <image> <image>?", "Yes.", pictures=2),
        '3 <image> marks but "image" lists 2 files',
    ),
    "a mark too few": (
        "template",
        talk("<image>?", "Yes.", pictures=2),
        '1 <image> mark but "image" lists 2 files',
    ),
    "in an answer": (
        "omnifusion, marked",
        talk("<image>?", "<image> Yes.", pictures=2),
        "turn 1 is the assistant's and shows a picture",
    ),
    "in words alone": (
        "text, marked",
        talk("<image><image>", "Yes.", pictures=2),
        "turn 0 holds nothing but <image>",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(tokenizer, case):
    style, dialogue, message = WRONG[case]
    with pytest.raises(DataError, match=r"^chat\.json\[7\]: ") as caught:
        laid(layout(tokenizer, style), dialogue)
    assert message in str(caught.value)


def test_media_of_another_kind_are_named(tokenizer):
    prepare = tiny.prepare(tokenizer, 96)
    heard = Dialogue("here", (("user", "What?"), ("assistant", "A cat.")), (Media("audio", "a.wav"),))
    with pytest.raises(DataError, match="here: this model takes no media of the kind 'audio', only image"):
        prepare(heard)


# --- targets that the tokenizer does not know


@pytest.mark.parametrize("style", ["original", *STYLES])
def test_an_unknown_target_costs_nothing_in_the_published_layout_alone(tokenizer, style):
    lay = tiny.layout(tokenizer, 512, 32, **STYLES.get(style, {"layout": style}))
    sample = laid(lay, talk("A <unk>?", "No <unk> cat.", pictures=0))
    unknown = sample.tokens == tokenizer.unk
    target = (sample.weights > 0) & unknown
    assert (unknown & (sample.kind < SPECIAL)).sum() == 2 and sample.weights[target].tolist() == [1]
    assert ((sample.kind == UNKNOWN) == (target if style == "original" else False)).all()


@pytest.mark.parametrize(("names", "pad"), [({}, "</s>"), ({"pad_token": "<s>"}, "<s>")])
def test_a_tokenizer_may_have_no_unknown_token(tmp_path, tokenizer, names, pad):
    """As those of Llama 3 and Qwen: what is no text holds its padding, or else the end of sequence."""
    vocabulary = json.loads((tokenizer.directory / "tokenizer.json").read_text().replace("<unk>", "<none>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    found = Tokenizer(tmp_path)
    assert found.unk is None and found.pad == found.backend.token_to_id(pad)
    for style in ("omnifusion", "original"):
        lay = Layout(found, ModelConfig(layout=style, image=GRID), 512)
        sample = laid(lay, tiny.dialogue((("user", "A?"), ("assistant", "No <none>")), *colours(1)))
        assert not (sample.kind == UNKNOWN).any()
        assert (sample.tokens[sample.kind >= SPECIAL] == found.pad).all()
        assert (sample.weights > 0).sum() == len(found.encode("No <none>")) + (style == "omnifusion")
