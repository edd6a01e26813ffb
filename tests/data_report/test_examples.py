"""Which records a report shows, and what of them."""

import base64
import io

import pytest
import talks
from PIL import Image
from talks import talk

from omnifusion_jax.data_report import examples as shown
from omnifusion_jax.data_report.examples import examples


def of(c):
    data, found = talks.gathered(c)
    return dict(examples(data, talks.tokenizer(), found))


@pytest.mark.parametrize(("usable", "places"), [(8, [1, 4, 8]), (2, [1, 2]), (1, [1]), (0, [])])
def test_usable_records_evenly_spaced(tmp_path, usable, places):
    """Lines from 1 on; the last line of the file cannot be used."""
    file = talks.write(tmp_path, [*(talk(i) for i in range(usable)), "{"])
    found = of(talks.config(file))["data"]
    assert [one.where for one in found] == [f'{file}:{n} (id "r{n - 1}")' for n in places]


def test_each_set_has_examples_in_its_own_layout(tmp_path):
    a, b = (talks.write(tmp_path, [talk(0, f"an answer of {name}")], f"{name}.jsonl") for name in "ab")
    c = talks.config(a, b)
    c.data.sets[1].layout = "text"
    (first,), (second,) = of(c).values()
    assert first.runs[-2:] == [("<BOT>", False), ("an answer of a</s>", True)]
    assert second.runs[-1] == ("an answer of b</s>", True) and second.runs[0][0].endswith("AI:")


def test_the_first_pictures_are_shown_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shown, "LONGEST", 5)
    names = [f"{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        talks.picture(tmp_path / name, 400 + i, 200)
    talks.picture(tmp_path / "small.png", 30, 20)
    file = talks.write(
        tmp_path,
        [talk(0, image=names, question="<image>" * 5 + "?"), talk(1, "an answer", image="small.png")],
    )
    many, small = of(talks.config(file, images=tmp_path, max_length=512))["data"]
    sizes = [size(picture) for picture in many.pictures]
    assert sizes == [(288, 144), (288, 144), (288, 143), (288, 143)]
    assert [size(picture) for picture in small.pictures] == [(30, 20)]
    assert small.runs[-1] == ("an an", True)  # of a long run the beginning


def size(url):
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))).size
