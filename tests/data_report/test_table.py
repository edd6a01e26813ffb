"""The report as text, line by line."""

import pytest

from omnifusion_jax.data_report import table

SCRIPTS = {"Latin": 0.75, "Cyrillic": 0.25, "CJK": 0.0, "other": 0.0}


def one(records, of, usable, counts=None, **more):
    """The figures of a set; `counts` are those of bins of 16 tokens."""
    numbers = {"smallest": 7, "median": 12.5, "p95": 30.0, "largest": 1032, "width": 16, "counts": counts}
    return {
        "records": records,
        "of": of,
        "usable": usable,
        "skipped": {},
        "too_long": 0,
        "cut": 0,
        "lost": 0.0,
        "tokens": numbers if counts else None,
        "pictures": {"number": 0, "sizes": {}, "tiles": {}},
        "scripts": SCRIPTS,
        "unread": {},
        **more,
    }


def test_sets():
    shown = {"number": 1500, "sizes": {"1-128 x 1-128": 1500}, "tiles": {1: 1400, 5: 100}}
    talks = one(2000, 2000, 1996, [1, 3, 0, 0], skipped={"missing": 3}, lost=0.0015, pictures=shown)
    talks["unread"] = {"i\nd": 1996}
    pages = one(40, None, 0, skipped={"missing": 1, "form": 2}, too_long=4, cut=9, lost=1.0)
    report = {"sets": {"talks": talks, "pa\nges": pages}, "all": one(2040, 2040, 1996, [3, 1, 0, 0])}
    assert table.sets(report) == [
        "                           talks      pa\\nges      all",
        "records                    2,000   40 of many    2,040",
        "  usable                   1,996            0    1,996",
        "  too long, left out           0            4        0",
        "  cut                          0            9        0",
        "  cut or left out          0.1 %      100.0 %    0.0 %",
        "  problem: missing             3            1        0",
        "  problem: form                0            2        0",
        "  nothing reads: i\\nd      1,996            0        0",
        "tokens, smallest               7                     7",
        "tokens, median                12                    12",
        "tokens, p95                   30                    30",
        "tokens, largest            1,032                 1,032",
        "  1 to 16                 25.0 %                75.0 %",
        "  17 to 32                75.0 %                25.0 %",
        "pictures                   1,500            0        0",
        "  pixels: 1-128 x 1-128    1,500            0        0",
        "  tiles: 1                 1,400            0        0",
        "  tiles: 5                   100            0        0",
        "answers in Latin          75.0 %       75.0 %   75.0 %",
        "answers in Cyrillic       25.0 %       25.0 %   25.0 %",
        "answers in CJK             0.0 %        0.0 %    0.0 %",
        "answers in other           0.0 %        0.0 %    0.0 %",
    ]
    alone = table.sets({"sets": {"talks": talks}, "all": talks})
    assert alone[0].split() == ["talks"]  # there is no "all" of one


def row(row_length, steps):
    shares = {"tokens": 0.984, "tiles": 0.5, "dialogues": 2.26}
    return {"row_length": row_length, "row_tiles": 12, **shares, "rows": 1300, "steps": steps}


def test_rows():
    fill = {"run": row(512, 9), "packed": [row(1024, 7)], "padded": 0.25, "bucketed": 0.875, "steps": 9}
    assert table.filled(fill) == [
        "           row_length   row_tiles   tokens    tiles   dialogues a row    rows   steps an epoch",
        "this run          512          12   98.4 %   50.0 %               2.3   1,300                9",
        "packed          1,024          12   98.4 %   50.0 %               2.3   1,300                7",
        "padded                              25.0 %",
        "bucketed                            87.5 %",
    ]
    assert [line.split()[0] for line in table.filled(fill | {"run": None})[1:]] == [
        "packed",
        "padded",
        "bucketed",
    ]
    assert table.filled(None) == []


def test_repeats():
    found = {
        "dialogues": {"times": [[1, 1200], [3, 2]], "most": ["a:1", "a:2", "a:3"]},
        "pictures": {"times": [[2, 3]], "most": ["a:4\x1b", "a:5", "a:6"]},
    }
    assert table.repeats({"all": {"repeated": found}}) == [
        "1 dialogue occurs 1,200 times",
        "3 dialogues occur 2 times",
        "    most often: a:1, a:2, a:3, ...",
        "2 pictures occur 3 times",
        "    most often: a:4\\x1b, a:5, a:6",
    ]
    many = {"times": [[1, n] for n in (9, 8, 7, 6, 5, 4)], "most": []}
    assert len(table.repeats({"all": {"repeated": {"dialogues": many}}})) == 5


@pytest.mark.parametrize(
    ("complete", "count", "last"),
    [
        (True, 3, "3 of 1,040 records have problems"),
        (False, 3, "PARTIAL: 1,039 of 1,040 records were looked at"),
        (True, 0, "nothing wrong with 1,040 records"),
    ],
)
def test_problems(complete, count, last):
    found = [{"set": "a", "reason": "form", "count": count, "examples": [{"message": "d:1: no\ndialogue"}]}]
    report = {
        "problems": found if count else [],
        "sets": {"a": 0, "b": 0},
        "of": 1040,
        "failed": ["it\tbroke"],
    }
    report |= {"complete": complete, "all": {"records": 1039}}
    named = ["3 x a: form", "    d:1: no\\ndialogue"] if count else []
    assert table.problems(report) == [*named, "the check itself failed: it\\tbroke", last]
    if count:
        assert table.problems(report | {"sets": {"a": 0}})[0] == "3 x form"


def test_the_first_line():
    read_with = {"tokenizer": "dir", "tokens": 32000, "max_length": 2048}
    head = "tokenizer dir (32,000 tokens), layout {}, max_length 2,048".format
    assert table.header(read_with | {"layouts": {"a": "text", "b": "text"}}) == head("text")
    assert table.header(read_with | {"layouts": {"a": "text", "b\r": "original"}}) == head(
        "a: text, b\\r: original"
    )


def test_all_of_it():
    """Parts stand apart by an empty line; one with nothing to say is not there."""
    talks = one(1, 1, 1, [1, 0], repeated={"dialogues": {"times": [], "most": []}})
    report = {"sets": {"d": talks}, "all": talks, "fill": None, "problems": [], "failed": []}
    said = table.text(report | {"complete": True, "of": 1})
    assert said.endswith("other         0.0 %\n\nnothing wrong with 1 records") and said.count("\n\n") == 1
