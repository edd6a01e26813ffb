"""What is counted of a data set, against sets that are counted by hand."""

import collections
import dataclasses
import os

import numpy as np
import pytest
import talks
from PIL import Image
from talks import talk

from omnifusion_jax.data_report.classes import script, size_class
from omnifusion_jax.data_report.figures import lengths
from omnifusion_jax.data_report.gather import EXAMPLES, PORTION, RECORD, USABLE, Found, Result, gather
from omnifusion_jax.data_report.report import report
from omnifusion_jax.data_report.watched import difference_hash


def reported(c):
    data, found = talks.gathered(c)
    return report(c, data, talks.tokenizer(), found)


# --- classes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", "Latin"),
        ("\u00e9t\u00e9 \u00d7", "Latin"),
        ("\u043a\u043e\u0442", "Cyrillic"),
        ("\u043a\u043e\u0442 OK", "Cyrillic"),
        ("\u732b", "CJK"),
        ("\u306d\u3053", "CJK"),
        ("\uace0\uc591\uc774", "CJK"),
        ("\u03b3\u03ac\u03c4\u03b1", "other"),
        ("42.50", "other"),
        ("", "other"),
    ],
)
def test_the_script_is_that_of_most_letters(text, expected):
    assert script(text) == expected


def test_classes_of_sizes():
    assert size_class(1, 128) == "1-128 x 1-128"
    assert size_class(129, 512) == "129-256 x 257-512"
    assert size_class(4096, 4097) == "2049-4096 x over 4096"


def test_the_hash_says_which_pixels_are_brighter_than_their_left_neighbours():
    grey = np.zeros((8, 9), np.uint8)
    grey[0, 1] = 200  # brighter than its left neighbour: the second pixel of the first row, its first bit
    grey[7, 8] = 100  # the last pixel of the last row, the last bit
    picture = Image.fromarray(grey).convert("RGB")
    assert difference_hash(picture) == 2**63 + 1
    assert difference_hash(picture.resize((90, 160), Image.Resampling.NEAREST)) == 2**63 + 1
    assert difference_hash(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) != 2**63 + 1
    assert difference_hash(Image.new("RGB", (50, 3), "red")) == 0


def test_bins_of_lengths():
    found = lengths(np.array([1, 16, 17, 32, 241, 256], np.int32), 256)
    assert found["width"] == 16 and found["counts"] == [2, 2, *[0] * 13, 2]
    found = lengths(np.array([100], np.int32), 100)
    assert found["width"] == 7 and sum(found["counts"]) == found["counts"][14] == 1
    assert lengths(np.zeros(0, np.int32), 100) is None


# --- a set counted by hand


@pytest.fixture
def folder(tmp_path):
    talks.picture(tmp_path / "a.png", 40, 30)
    talks.picture(tmp_path / "b.png", 300, 30, seed=1)
    Image.open(tmp_path / "a.png").save(tmp_path / "copy.bmp")
    talks.broken(tmp_path / "broken.png")
    return tmp_path


def test_a_set_counted_by_hand(folder):
    turns = [{"from": who, "value": "Hm?"} for who in ("human", "gpt") * 2]
    records = [
        talk(0, image="a.png") | {"model": "gpt", "imagee": "b.png"},  # which has its picture
        talk(1, image="copy.bmp") | {"model": ""},  # what is said, and the picture, are those of record 0
        talk(2, "\u043a\u043e\u0442", image="b.png"),
        talk(3, "\u732b", image=["b.png", "a.png"], question="<image>\nWhat?"),
        {"id": 4, "conversations": turns},
        talk(5, image="gone.png"),
        talk(6, image="broken.png"),
        "{",
        talk(8, "cat " * 400),
    ]
    c = talks.config(talks.write(folder, records), images=folder)
    found = reported(c)
    assert found["complete"] and found["of"] == 9 and not found["failed"]
    one = found["sets"]["data"]
    assert one == found["all"]
    assert (one["records"], one["of"], one["usable"], one["cut"], one["too_long"]) == (9, 9, 5, 0, 0)
    assert one["skipped"] == {"damaged": 1, "missing": 1, "not_json": 1, "too_long": 1}
    assert one["lost"] == pytest.approx(4 / 9)
    prepare = talks.opened(c).prepare
    lengths = [len(prepare(member).tokens) for member in map(talks.opened(c).source.__getitem__, range(5))]
    tokens = one["tokens"]
    assert tokens["sum"] == sum(lengths) and tokens["median"] == np.median(lengths)
    assert (tokens["smallest"], tokens["largest"]) == (min(lengths), max(lengths))
    assert tokens["width"] == 16 and len(tokens["counts"]) == 16
    in_bins = [sum(16 * k < n <= 16 * (k + 1) for n in lengths) for k in range(16)]
    assert tokens["counts"] == in_bins
    sizes = {"1-128 x 1-128": 3, "257-512 x 1-128": 2}
    assert one["pictures"] == {"number": 5, "sizes": sizes, "tiles": {1: 5}}
    # six answers: "a cat" twice, one Russian, one Chinese, two "Hm?"
    shares = {"Latin": 4 / 6, "Cyrillic": 1 / 6, "CJK": 1 / 6, "other": 0.0}
    assert one["scripts"] == pytest.approx(shares)
    assert one["unread"] == {"imagee": 1, "model": 1}
    file = folder / "d.jsonl"
    assert one["repeated"]["dialogues"] == {"times": [[1, 2]], "most": [f"{file}:1", f"{file}:2"]}
    pictures = one["repeated"]["pictures"]
    assert pictures == {"times": [[1, 3], [1, 2]], "most": [f"{file}:{n}" for n in (1, 2, 4)]}


def test_problems_have_their_first_examples_with_file_and_line(folder):
    records = [talk(0), *(talk(i, image=f"gone{i}.png") for i in range(1, 9)), talk(9, " ")]
    found = reported(talks.config(talks.write(folder, records), images=folder))
    first, second = found["problems"]
    assert (first["set"], first["reason"], first["count"]) == ("data", "missing", 8)
    assert [example["index"] for example in first["examples"]] == list(range(1, 1 + EXAMPLES))
    file = folder / "d.jsonl"
    assert first["examples"][0] == {
        "index": 1,
        "where": f"{file}:2",
        "message": f'{file}:2 (id "r1"): {folder}/gone1.png: there is no such file. Check the name.',
    }
    assert (second["reason"], second["count"]) == ("empty_turn", 1)


@pytest.mark.parametrize(
    ("on_long", "usable", "problems", "too_long", "cut"),
    [("raise", 1, {"too_long": 2}, 0, 0), ("skip", 1, {}, 2, 0), ("cut", 2, {"too_long": 1}, 0, 1)],
)
def test_dialogues_that_are_too_long(folder, on_long, usable, problems, too_long, cut):
    """One can be cut after its first answer, the other cannot."""
    long = talk(1)
    long["conversations"] += talk(1, "cat " * 400)["conversations"]
    c = talks.config(talks.write(folder, [talk(0), long, talk(2, "cat " * 400)]), on_long=on_long)
    one = reported(c)["all"]
    assert (one["usable"], one["skipped"], one["too_long"], one["cut"]) == (usable, problems, too_long, cut)
    assert one["lost"] == pytest.approx((sum(problems.values()) + too_long + cut) / 3)


def test_problems_of_several_sets_the_most_frequent_first(folder):
    gone = lambda n: [talk(i, image="gone.png") for i in range(n)]
    empty = [talk(0, " ")]
    a = talks.write(folder, ["{", *gone(1)], "a.jsonl")
    b = talks.write(folder, [*gone(2), *empty, *gone(1), "{"], "b.jsonl")
    found = reported(talks.config(a, b, images=folder))
    assert [(one["count"], one["set"], one["reason"]) for one in found["problems"]] == [
        (3, "b", "missing"),
        (1, "a", "missing"),
        (1, "a", "not_json"),
        (1, "b", "empty_turn"),
        (1, "b", "not_json"),
    ]
    assert [one["index"] for one in found["problems"][0]["examples"]] == [2, 3, 5]
    assert found["all"]["skipped"] == {"missing": 4, "not_json": 2, "empty_turn": 1}
    assert list(found["all"]["skipped"]) == ["missing", "not_json", "empty_turn"]
    read_with = found["read_with"]
    assert (read_with["max_length"], read_with["tokens"]) == (256, 852)
    assert read_with["tokenizer"].endswith("omnifusion-tiny-decoder")


def test_samples_without_targets_are_a_problem(folder):
    """In the layout "original" a dialogue without an answer is taken, and a long one loses its end."""
    question = {"id": "q", "conversations": [{"from": "human", "value": "What?"}]}
    c = talks.config(talks.write(folder, [talk(0), question, talk(2, "cat " * 400)]))
    c.model = dataclasses.replace(c.model, layout="original")
    found = reported(c)
    assert found["all"]["usable"] == 2 and found["all"]["skipped"] == {"no_targets": 1}
    assert found["all"]["cut"] == 1 and found["all"]["tokens"]["largest"] == 256
    (problem,) = found["problems"]
    place = f'{folder / "d.jsonl"}:2 (id "q")'
    assert problem["examples"][0]["message"] == f"{place}: no token is a target: nothing is learned"


def test_each_set_is_looked_at_in_its_own_layout(folder):
    paths = [talks.write(folder, [talk(0), talk(1, "cat " * 400)], f"{name}.jsonl") for name in "ab"]
    c = talks.config(*paths)
    c.data.sets[1].layout = "original"  # which cuts what is too long
    found = reported(c)["sets"]
    assert [(one["usable"], one["cut"]) for one in found.values()] == [(1, 0), (2, 1)]


def test_tiles_that_fit_no_row_are_a_problem(folder):
    record = talk(0, image=["a.png"] * 3, question="<image><image>\nWhat?")
    c = talks.config(talks.write(folder, [record, talk(1, image="a.png")]), images=folder)
    assert reported(c)["all"]["usable"] == 2
    c.data = dataclasses.replace(c.data, packing=True, row_tiles=2)
    assert reported(c)["all"]["skipped"] == {"tiles": 1}


def test_pictures_are_looked_at_as_training_does(folder):
    """Cut into tiles, and with its limit of pixels."""
    records = [talk(0, image="a.png"), talk(1, image="b.png")]  # 40 x 30 and 300 x 30
    c = talks.config(talks.write(folder, records), images=folder, max_length=512, max_pixels=8999)
    c.model.image.fit, c.model.image.grids = "tiles", ((1, 1), (1, 3))
    assert reported(c)["all"]["pictures"]["tiles"] == {2: 1}
    assert reported(c)["all"]["skipped"] == {"size": 1}
    c.data.max_pixels = 9000
    assert reported(c)["all"]["pictures"]["tiles"] == {2: 1, 4: 1}


def test_sets_are_counted_apart_and_together(folder):
    a = talks.write(folder, [talk(i) for i in range(PORTION + 3)], "a.jsonl")
    b = talks.write(folder, [talk(0, image="gone.png"), talk(1), talk(2, "b"), talk(3, "b")], "b.json")
    found = reported(talks.config(a, b, images=folder))
    assert list(found["sets"]) == ["a", "b"]
    assert [one["usable"] for one in found["sets"].values()] == [PORTION + 3, 3]
    assert found["all"]["usable"] == PORTION + 6 and found["of"] == PORTION + 7
    # the same is said in both sets
    assert found["all"]["repeated"]["dialogues"]["times"] == [[1, PORTION + 4], [1, 2]]
    repeated = {"times": [[1, 2]], "most": [f"b: {b}[2]", f"b: {b}[3]"]}
    assert found["sets"]["b"]["repeated"]["dialogues"] == repeated
    (problem,) = found["problems"]
    assert (problem["set"], problem["examples"][0]["where"]) == ("b", f"b: {b}[0]")


def test_of_a_source_without_an_end_the_beginning_is_looked_at(monkeypatch):
    monkeypatch.setattr("omnifusion_jax.data_report.gather.ENOUGH", 40)
    found = reported(talks.config("synthetic:captions"))
    assert found["all"]["records"] == 40 and found["all"]["of"] is None and found["complete"]
    assert found["all"]["pictures"]["number"] == 40 and found["fill"]["padded"] > 0


def test_what_fills_max_length_is_not_cut(folder):
    file = talks.write(folder, [talk(0)])
    (n,) = talks.gathered(talks.config(file))[1].found[0].records["tokens"].tolist()
    one = reported(talks.config(file, max_length=n))["all"]
    assert (one["usable"], one["cut"], one["lost"]) == (1, 0, 0.0)


def test_a_long_message_is_shortened(folder):
    record = {"conversations": [{"from": "b" * 3000, "value": "What?"}]}
    (problem,) = reported(talks.config(talks.write(folder, [record])))["problems"]
    assert len(problem["examples"][0]["message"]) == 1000


def test_portions_may_come_in_any_order():
    found = Found("d", 10, 4, False)
    records = np.zeros(2, RECORD)
    records["state"] = USABLE
    for start, hashes in ((12, [7, 8]), (10, [5])):
        counts = {"tiles": collections.Counter({1: len(hashes)})}
        problems = [(start + 1, "form", f"{start + 1}: no"), (start, "form", f"{start}: no")]
        found.add(range(start, start + 2), Result(records, np.array(hashes, np.uint64), counts, problems))
        assert found.looked == (2 if start == 12 else 4)
    assert found.hashes.tolist() == [5, 7, 8] and found.counts["tiles"] == {1: 3}
    assert found.problems["form"] == (4, [(i, f"{i}: no") for i in range(10, 14)])


def test_no_usable_record_at_all(folder):
    found = reported(talks.config(talks.write(folder, ["{", "["])))
    assert found["all"]["tokens"] is None and found["fill"] is None and found["all"]["usable"] == 0


def test_a_record_takes_little_memory():
    assert RECORD.itemsize <= 24


# --- worker processes


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_find_the_same(folder, processes):
    bad = {4: talk(4, image="gone.png"), 70: talk(70, image="broken.png")}
    records = [bad.get(i, talk(i, f"a cat {i}", image="a.png")) for i in range(3 * PORTION + 5)]
    c = talks.config(talks.write(folder, records), images=folder)
    data, expected = talks.gathered(c)
    done = []
    found, sweep = gather(data, c.data, processes, done.append)
    sweep.wait()
    assert sum(done) == len(records) and found.complete
    make = lambda gathered: report(c, data, talks.tokenizer(), gathered)
    assert make(found) == make(expected) and make(found)["all"]["usable"] == len(records) - 2


def test_a_process_that_dies_is_told_with_what_it_read(folder):
    class Deadly(type(talks.opened(talks.config("synthetic:captions")).source)):
        def __getitem__(self, i):
            return os._exit(3) if i == PORTION + 1 else super().__getitem__(i)

    file = talks.write(folder, [talk(i) for i in range(3 * PORTION)])
    c = talks.config(file)
    data = talks.opened(c)
    data = data._replace(source=Deadly(dict(zip(data.source.names, data.source.sources, strict=True))))
    found, sweep = gather(data, c.data, 1)
    sweep.wait()
    (failure,) = found.failed
    assert "a process that reads data ended with status 3" in failure
    assert failure.endswith(f"It was reading {file}:{PORTION + 1} to {file}:{2 * PORTION}")
    partial = report(c, data, talks.tokenizer(), found)
    assert not partial["complete"] and partial["fill"] is None and partial["all"]["records"] == PORTION
