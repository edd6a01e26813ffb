"""The reason that an error has, by which reports count it, wherever it is raised."""

import base64

import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.data.dialogues import Dialogue, Request, from_request, located, parse
from omnifusion_jax.data.images import fit, image_size, open_image
from omnifusion_jax.errors import DataError

ANSWERED = (("user", "What?"), ("assistant", "A cat."))
PICTURE = np.zeros((24, 24, 3), np.uint8)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt }}"
)


def said(*content, **more):
    return lambda: parse({"messages": [{"role": "user", "content": one} for one in content], **more}, "here")


def text(words):
    return {"type": "text", "text": words}


PARSED = {
    "no object": ("form", lambda: parse([], "here")),
    "no turns": ("form", lambda: parse({"id": 1}, "here")),
    "no list of turns": ("form", lambda: parse({"conversations": "What?"}, "here")),
    "an empty list of turns": ("form", lambda: parse({"messages": []}, "here")),
    "a turn without words": ("form", lambda: parse({"conversations": [{"from": "human"}]}, "here")),
    "parts in LLaVA's form": (
        "form",
        lambda: parse({"conversations": [{"from": "human", "value": [text("a")]}]}, "here"),
    ),
    "an instruction without words": ("form", lambda: parse({"instruction": 1, "output": "a"}, "here")),
    "half a character": ("characters", said("\ud83d")),
    "half a character in a part": ("characters", said([text("\ud83d")])),
    "half a character in an instruction": (
        "characters",
        lambda: parse({"instruction": "\ud83d", "output": "a"}, "here"),
    ),
    "a part of another type": ("part", said([{"type": "video"}])),
    "a part that is no object": ("part", said(["What?"])),
    "a text part without text": ("part", said([{"type": "text"}])),
    "an address without a name": ("part", said([{"type": "image_url", "image_url": {}}])),
    "parts and marks": ("marks", said([{"type": "image"}, text("<image>")], images=["a"])),
    "more parts than pictures": ("marks", said([{"type": "image"}])),
    "fewer parts than pictures": ("marks", said([{"type": "image"}, text("a")], images=["a", "b"])),
    "a picture of another type": ("media", lambda: located(5, "image", "")),
    "an object without bytes": ("media", lambda: located({"path": "a"}, "image", "")),
    "a name outside": ("outside", lambda: located("../a", "image", "pics")),
    "a name that cannot be": ("missing", lambda: located("a\0", "image", "pics")),
    "a stream that there is not": ("media", lambda: from_request(Request([], media={"smell": [1]}))),
    "pictures beside images": ("media", lambda: from_request(Request([], media={"image": [PICTURE]}))),
    "no source of a picture": ("media", lambda: open_image(None)),
    "floats": ("media", lambda: open_image(PICTURE / 255)),
    "another shape": ("media", lambda: open_image(PICTURE[0, 0])),
    "float grey": ("levels", lambda: image_size(Image.new("F", (2, 2)))),
    "grey beyond 16 bits": ("levels", lambda: open_image(Image.fromarray(np.full((2, 2), 65536, np.int32)))),
    "grey below black": ("levels", lambda: open_image(Image.fromarray(np.full((2, 2), -1, np.int32)))),
    "too many pixels": ("size", lambda: open_image(PICTURE, max_pixels=575)),
    "too long to pad": ("size", lambda: fit(Image.new("RGB", (1, 16_385)), 8, "pad")),
    "an address": ("not_fetched", lambda: open_image("https://example.org/a.png")),
    "no file": ("missing", lambda: open_image("gone.png")),
    "a folder": ("missing", lambda: open_image("/")),
    "an empty file": ("file_size", lambda: open_image(b"")),
    "a data URL without base64": ("data_url", lambda: open_image("data:image/png,AAAA")),
    "a data URL with damage": ("data_url", lambda: open_image("data:image/png;base64,A")),
    "an empty data URL": ("data_url", lambda: open_image("data:image/png;base64,")),
    "no picture": ("not_a_picture", lambda: open_image(b"not a picture")),
    "no picture in a data URL": (
        "not_a_picture",
        lambda: open_image("data:image/png;base64," + base64.b64encode(b"not a picture").decode()),
    ),
}


@pytest.mark.parametrize("case", PARSED)
def test_reasons_of_records_and_pictures(case):
    reason, call = PARSED[case]
    with pytest.raises(DataError) as caught:
        call()
    assert caught.value.reason == reason, caught.value


MARKED = {"image_place": "mark"}
WRITTEN = {"layout": "template", "template": TEMPLATE, "prompt": ""}
LAID = {
    "a picture without a mark": ("marks", {}, ANSWERED, 1, {"marked": True}),
    "another number of marks": ("marks", {}, (("user", "<image>?"), ANSWERED[1]), 2, {}),
    "two pictures in the original": ("marks", {"layout": "original"}, ANSWERED, 2, {}),
    "a later picture in the original": (
        "marks",
        {"layout": "original"},
        (*ANSWERED, ("user", "<image>")),
        1,
        {"parted": True},
    ),
    "an answer that shows": ("marks", MARKED, (ANSWERED[0], ("assistant", "<image>.")), 1, {}),
    "an unknown speaker": ("speaker", {}, (("bard", "What?"), ANSWERED[1]), 0, {}),
    "the system": ("speaker", {}, (("system", "Be brief."), *ANSWERED), 0, {}),
    "a system that a template loses": (
        "speaker",
        WRITTEN | {"template": TEMPLATE.replace("in messages", "in messages if m['role'] != 'system'")},
        (("system", "Be brief."), *ANSWERED),
        0,
        {},
    ),
    "an empty turn": ("empty_turn", {}, (("user", " "), ANSWERED[1]), 0, {}),
    "nothing but a mark": ("empty_turn", {}, (("user", "<image>"), ANSWERED[1]), 1, {}),
    "the assistant first": ("order", {}, ANSWERED[::-1], 0, {}),
    "no answer": ("no_answer", {}, ANSWERED[:1], 0, {}),
    "too many tokens": ("too_long", {}, (ANSWERED[0], ("assistant", "red " * 300)), 0, {}),
    "a template that forgets": (
        "template",
        WRITTEN | {"template": "{% set messages = messages[-2:] %}" + TEMPLATE},
        ANSWERED * 2,
        0,
        {},
    ),
    "a template that refuses": (
        "template",
        WRITTEN | {"template": "{{ raise_exception('no') if messages | length > 1 }}" + TEMPLATE},
        ANSWERED,
        0,
        {},
    ),
}


@pytest.mark.parametrize("case", LAID)
def test_reasons_of_dialogues(tokenizer, case):
    reason, settings, turns, shown, form = LAID[case]
    dialogue = Dialogue("here", turns, tiny.shown(*[PICTURE] * shown), **form)
    with pytest.raises(DataError, match=r"^here: ") as caught:
        tiny.prepare(tokenizer, 200, 24, 8, **settings)(dialogue)
    assert caught.value.reason == reason, caught.value


@pytest.mark.parametrize(("turns", "last"), [(ANSWERED, "assistant"), ((("system", "Be brief."),), "system")])
def test_what_is_asked_ends_with_a_question(tokenizer, turns, last):
    with pytest.raises(
        DataError, match=rf"here: the last turn is the {last}'s\. End with a question"
    ) as caught:
        tiny.layout(tokenizer, 200, **WRITTEN)(Dialogue("here", turns), [], ask=True)
    assert caught.value.reason == "order"
