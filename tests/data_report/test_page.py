"""report.html: what data says is text, it loads nothing, and it does without matplotlib."""

import base64
import html.parser
import io
import json
import sys

import pytest
import talks
from PIL import Image
from talks import talk

from omnifusion_jax.data_report import plots
from omnifusion_jax.data_report.page import charts
from omnifusion_jax.data_report.report import clear, report, write
from omnifusion_jax.errors import DataError

EVIL = "<script>alert('1')</script><img src=x onerror=alert(2)> {{ 7 * 7 }} [[not a target]]"


class Tags(html.parser.HTMLParser):
    """(tag, attributes) of all tags, the text in all, and the text of each target."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.targets, self.inside = [], "", [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = ("class", "target") in attributes

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.targets.append(data)
        self.inside = False

    def sources(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


def written(c, folder):
    data, found = talks.gathered(c)
    made = report(c, data, talks.tokenizer(), found)
    clear(folder)
    return write(folder, made, data, talks.tokenizer(), found)


@pytest.fixture
def hostile(tmp_path):
    talks.picture(tmp_path / "a.png", 600, 300)
    records = [
        talk(EVIL, f"{EVIL} is the answer", image="a.png", question=EVIL),
        talk(f"{EVIL}\x1b[2J", image=f"{EVIL}.png"),
        talk("half", "an answer", image=None, question="\ud83d"),
        talk("half \ud83d", image="gone.png"),
    ]
    lines = [json.dumps(one) for one in records]
    return talks.config(talks.write(tmp_path, lines), images=tmp_path, max_length=1024)


def test_what_a_dialogue_says_is_text(hostile, tmp_path):
    as_json, as_html = written(hostile, tmp_path / "out" / "deep")
    page = Tags(as_html.read_text(encoding="utf-8"))
    assert "script" not in dict(page.tags) and not any("onerror" in found for _, found in page.tags)
    assert page.text.count("<script>alert('1')</script>") >= 4  # question, answer, and a problem's message
    assert "{{ 7 * 7 }}" in page.text and "49" not in page.text
    assert 'id "rhalf \\ud83d"' in page.text  # what UTF-8 cannot hold
    assert all(source.startswith("data:image/") for source in page.sources())
    assert not [tag for tag, found in page.tags if tag in ("link", "iframe") or "href" in found]
    (policy,) = [found for tag, found in page.tags if "http-equiv" in found]
    assert policy["content"].startswith("default-src 'none'; img-src data:;")
    found = json.loads(as_json.read_text())
    assert found["complete"] and len(found["problems"]) == 2
    assert sorted(file.name for file in as_json.parent.iterdir()) == ["report.html", "report.json"]


def test_targets_are_marked_and_the_picture_is_shown(hostile, tmp_path):
    page = Tags(written(hostile, tmp_path / "out")[1].read_text(encoding="utf-8"))
    legend, answer = page.targets
    assert legend == "targets" and answer.endswith("is the answer</s>") and "[[not a target]]" in answer
    (photo,) = [source for source in page.sources() if source.startswith("data:image/jpeg;base64,")]
    shown = Image.open(io.BytesIO(base64.b64decode(photo.partition(",")[2])))
    assert shown.format == "JPEG" and shown.size == (288, 144)


def test_charts_are_drawn_where_matplotlib_is(hostile, tmp_path):
    pytest.importorskip("matplotlib")
    first = written(hostile, tmp_path / "one")[1].read_bytes()
    page = Tags(first.decode())
    drawn = [source for source in page.sources() if source.startswith("data:image/svg+xml;base64,")]
    assert len(drawn) == 4
    assert all(base64.b64decode(url.partition(",")[2]).startswith(b"<?xml") for url in drawn)
    assert "matplotlib" not in page.text
    assert written(hostile, tmp_path / "two")[1].read_bytes() == first


def test_what_is_drawn(monkeypatch):
    """A chart for each count of which there are any, with names and numbers of its own."""
    drawn = []
    monkeypatch.setattr(plots, "bars", lambda counts, label: drawn.append((counts, label)) or label)
    found = {
        "tokens": {"width": 600, "counts": [5, 0, 1]},
        "pictures": {"sizes": {"1-128 x 1-128": 3}, "tiles": {1: 2, 5: 1}},
        "scripts": {"Latin": 0.75, "other": 0.25},
    }
    assert [title for title, _ in charts(found)] == [
        "Tokens of a dialogue",
        "Sizes of pictures",
        "Tiles of pictures",
        "Scripts of answers",
    ]
    assert drawn == [
        ({"1 to 600": 5, "601 to 1,200": 0, "1,201 to 1,800": 1}, "dialogues"),
        ({"1-128 x 1-128": 3}, "pictures"),
        ({"1": 2, "5": 1}, "pictures"),
        ({"Latin": 0.75, "other": 0.25}, "share of the answers"),
    ]
    nothing = {"tokens": None, "pictures": {"sizes": {}, "tiles": {}}, "scripts": {"Latin": 0.0}}
    assert charts(nothing) == []


def test_without_matplotlib_the_page_says_so(hostile, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert not plots.can_draw()
    page = Tags(written(hostile, tmp_path / "out")[1].read_text(encoding="utf-8"))
    assert 'matplotlib is not installed (pip install "omnifusion-jax[report]")' in page.text
    assert all(source.startswith("data:image/jpeg") for source in page.sources())


def test_an_earlier_report_is_gone_before_the_next_begins(tmp_path):
    for name in ("report.json", "report.html", "mine.txt"):
        (tmp_path / name).write_text("old")
    clear(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--output=.*/file cannot be written: .*\. Give another"):
        clear(tmp_path / "file")
