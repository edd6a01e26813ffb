"""--fix: the records without problems, as they were."""

import json

import numpy as np
import pytest
import talks
from talks import talk

from omnifusion_jax.data.dialogues import Dialogue, Media, from_record
from omnifusion_jax.data_report.fix import check_target, rebuilt, write_clean
from omnifusion_jax.errors import DataError
from omnifusion_jax.tables import SOURCES


def cleaned(c, path):
    data, found = talks.gathered(c)
    check_target(path, data.source, c.data.images)
    return write_clean(path, found, data.source, c.data.images)


NOTED = (
    '{"id": 0, "note": 1e400, "conversations": [{"from": "human", "value": "\\u0041?"},   '
    '{"from": "gpt", "value": "caf\u00e9"}]}'
)
TWICE = (
    '{"id": 3, "id": 4, "messages": [{"role": "user", "content": "a, "}, '
    '{"role": "assistant", "content": "b"}]}'
)
LINES = [NOTED, "{", json.dumps(talk(2, image="gone.png")), TWICE]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_records_are_kept_byte_for_byte(tmp_path, name):
    lines = LINES if name == "d.jsonl" else [LINES[0], LINES[2], LINES[3]]
    if name == "d.jsonl":
        (tmp_path / name).write_text("\n\n".join(lines) + "\r\n", encoding="utf-8-sig")
    else:
        (tmp_path / name).write_text("[" + " ,\n ".join(lines) + " ]\n", encoding="utf-8")
    c = talks.config(tmp_path / name, images=tmp_path)
    assert cleaned(c, tmp_path / "clean.json") == 2
    expected = "[\n" + f"{NOTED},\n{TWICE}" + "\n]\n"
    assert (tmp_path / "clean.json").read_text(encoding="utf-8") == expected
    assert cleaned(c, tmp_path / "again.json") == 2
    assert (tmp_path / "again.json").read_bytes() == expected.encode()
    # the clean set is clean, and is its own clean set
    again = talks.config(tmp_path / "clean.json", images=tmp_path)
    assert not talks.gathered(again)[1].found[0].problems
    assert cleaned(again, tmp_path / "third.json") == 2
    assert (tmp_path / "third.json").read_bytes() == expected.encode()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("clean.json.")]


def test_nothing_is_overwritten(tmp_path):
    c = talks.config(talks.write(tmp_path, [talk(0)], "d.json"))
    data, found = talks.gathered(c)
    before = (tmp_path / "d.json").read_bytes()
    with pytest.raises(DataError, match=r"d\.json is there already, and is not overwritten"):
        check_target(tmp_path / "d.json", data.source, "")
    with pytest.raises(DataError, match=r"d\.json has appeared meanwhile, and is not overwritten"):
        write_clean(tmp_path / "d.json", found, data.source, "")
    assert (tmp_path / "d.json").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written_is_said_before(tmp_path):
    a, b = (talks.write(tmp_path, [talk(0)], name) for name in ("a.json", "b.json"))
    source = talks.opened(talks.config(a)).source
    for path, words in (
        (tmp_path / "new.jsonl", "give a name that ends in .json"),
        (tmp_path / "nowhere" / "new.json", "there is no folder"),
    ):
        with pytest.raises(DataError, match=words):
            check_target(path, source, "")
    both = talks.opened(talks.config(a, b)).source
    with pytest.raises(DataError, match="writes one set, not 2: choose it by --data=FILE"):
        check_target(tmp_path / "new.json", both, "")
    pictures = talks.opened(talks.config("synthetic:captions")).source
    with pytest.raises(DataError, match=r"is no file, which --fix needs.*prepare_data --on_bad_sample=skip"):
        check_target(tmp_path / "new.json", pictures, "")


def test_a_set_without_a_good_record_gives_no_file(tmp_path):
    c = talks.config(talks.write(tmp_path, ["{", "["]))
    with pytest.raises(DataError, match="no record is without a problem"):
        cleaned(c, tmp_path / "clean.json")
    assert not (tmp_path / "clean.json").exists()


PARTS = [
    {"type": "text", "text": "See\n"},
    {"type": "image"},
    {"type": "image"},
    {"type": "text", "text": "?"},
]
ANSWER = {"role": "assistant", "content": "\u043a\u043e\u0442"}
RECORDS = [
    talk(0, image=["a.png", "b.png"], question="<image>\nWhat?"),
    talk(1),
    {"images": ["a.png"], "messages": [{"role": "user", "content": "What?"}, ANSWER]},
    {"images": ["a.png"], "messages": [{"role": "user", "content": "What<image>?"}, ANSWER]},
    {"images": ["b.png", "a.png"], "messages": [{"role": "user", "content": PARTS}, ANSWER]},
]


@pytest.mark.parametrize("images", ["", "some/pictures"])
@pytest.mark.parametrize("record", RECORDS)
def test_a_dialogue_becomes_a_record_that_reads_as_it(record, images):
    dialogue = from_record(record, "here", images)
    again = from_record(json.loads(rebuilt(dialogue, images)), dialogue.where, images)
    assert again == dialogue


def test_other_sources_are_rebuilt(tmp_path, monkeypatch):
    """Those whose pictures are files; what no record can say is refused."""
    talks.picture(tmp_path / "a.png")
    turns = (("user", "<image>?"), ("assistant", "a cat"))
    shown = (Media("image", tmp_path / "a.png"),)

    class Mine(list):
        def __init__(self, *dialogues):
            super().__init__(dialogues)

    good, bad = Dialogue("mine[0]", turns, shown), Dialogue("mine[1]", turns[:1], shown)
    monkeypatch.setitem(SOURCES, "mine", lambda rest, images, side: Mine(good, bad, good))
    c = talks.config("mine:", images=tmp_path)
    assert cleaned(c, tmp_path / "clean.json") == 2
    record = {"images": ["a.png"], "messages": [{"role": role, "content": text} for role, text in turns]}
    assert json.loads((tmp_path / "clean.json").read_text()) == [record, record]
    named = Dialogue("mine[0]", turns, shown, marked=True, parted=True)
    monkeypatch.setitem(SOURCES, "mine", lambda rest, images, side: Mine(named))
    with pytest.raises(DataError, match=r"mine\[0\]: a JSON record cannot say the same"):
        cleaned(c, tmp_path / "other.json")
    pixels = Dialogue("mine[0]", turns, (Media("image", np.zeros((9, 9, 3), np.uint8)),))
    monkeypatch.setitem(SOURCES, "mine", lambda rest, images, side: Mine(pixels))
    with pytest.raises(DataError, match=r"mine\[0\]: its image is no file"):
        cleaned(c, tmp_path / "other.json")
