"""MiniCPM-V's data for fine-tuning: a dialogue is that of LLaVA's record of the same pictures and words."""

import dataclasses
import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from omnifusion_jax.data.dialogues import from_record
from omnifusion_jax.data.modality import check_marks
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.errors import DataError

NAMED = {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}


def published(image, *texts):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"id": "0", "image": image, "conversations": turns}


def llava(images, *texts):
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "0", "image": images, "conversations": turns}


def same(ours, theirs):
    """But for the words for speakers, and for what LLaVA's form alone promises: a mark for each picture."""
    words = {"human": "user", "gpt": "assistant"}
    turns = tuple((words[role], text) for role, text in theirs.turns)
    return ours == dataclasses.replace(theirs, turns=turns, marked=False)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (published("a.jpg", "<image>\nWhat?", "A cat."), llava("a.jpg", "<image>\nWhat?", "A cat.")),
        (published("a.jpg", "What?", "A cat."), llava("a.jpg", "What?", "A cat.")),
        (published(None, "What?", "A cat."), llava([], "What?", "A cat.")),
        (
            published(NAMED, "<image_00>\n<image_01>\nWhich?", "The first."),
            llava(["a.jpg", "b.jpg"], "<image>\n<image>\nWhich?", "The first."),
        ),
        (  # the names say which picture stands where, not the order in which they are listed
            published(NAMED, "Is <image_01> red?", "No.", "And <image_00>?", "Yes."),
            llava(["b.jpg", "a.jpg"], "Is <image> red?", "No.", "And <image>?", "Yes."),
        ),
        (published(NAMED, "Which?", "The first."), llava(["a.jpg", "b.jpg"], "Which?", "The first.")),
    ],
)
def test_the_same_dialogue_as_llavas(record, expected):
    found = from_record(record, "here", "pictures")
    assert same(found, from_record(expected, "here", "pictures"))
    check_marks(found, interleaved=True)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_files_of_it(tmp_path, suffix):
    records = [
        published(NAMED, "<image_01> or <image_00>?", "Both."),
        published({"<image_00>": "c.jpg"}, "<image_00>\nWhat?", "A cat."),
    ]
    file = tmp_path / f"data.{suffix}"
    if suffix == "parquet":  # where every record has every name, with null for those that it lacks
        parquet.write_table(pa.Table.from_pylist(records), file)
    elif suffix == "json":
        file.write_text(json.dumps(records))
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = open_source(str(file), str(tmp_path), 1)
    both, one = source[0], source[1]
    assert [image.name for image in both.images] == ["b.jpg", "a.jpg"]
    assert both.turns == (("user", "<image> or <image>?"), ("assistant", "Both."))
    assert [image.name for image in one.images] == ["c.jpg"] and one.turns[0] == ("user", "<image>\nWhat?")


@pytest.mark.parametrize(
    ("image", "text", "said"),
    [
        (NAMED, "<image_00>?", 'the text has <image_00>, and "image" lists <image_00>, <image_01>. Let'),
        (NAMED, "<image_00> <image_02>?", "has <image_00>, <image_02>, and"),
        (NAMED, "<image_00> <image_01> <image_00>?", "has <image_00>, <image_01>, <image_00>, and"),
        ("a.jpg", "<image_00>?", 'and "image" lists none by name'),
        (None, "<image_00>?", 'and "image" lists none by name'),
        (NAMED, "<image> <image_00> <image_01>?", 'the text has 3 <image> marks but "image" lists 2 files'),
        ("a.jpg", "<image> and <image>?", 'the text has 2 <image> marks but "image" lists 1 file'),
        (["a.jpg", "b.jpg"], "<image>?", 'the text has 1 <image> mark but "image" lists 2 files'),
    ],
)
def test_marks_that_do_not_fit_the_pictures(image, text, said):
    with pytest.raises(DataError, match=r'here \(id "0"\)') as caught:
        check_marks(from_record(published(image, text, "No."), "here", "pictures"), interleaved=True)
    assert said in str(caught.value) and caught.value.reason == "marks"


@pytest.mark.parametrize("image", [{}, {"<image_00>": "a.jpg", "left": "b.jpg"}, {"<image_00>": 5}])
def test_other_objects_are_no_pictures(image):
    with pytest.raises(DataError) as caught:
        from_record(published(image, "What?", "A cat."), "here", "pictures")
    assert caught.value.reason == "media"


def test_turns_of_both_forms_are_none():
    record = published("a.jpg", "What?", "A cat.")
    record["conversations"][1] = {"from": "gpt", "value": "A cat."}
    with pytest.raises(DataError, match=r"conversations\[1\] is not an object with the strings 'role'"):
        from_record(record, "here", "pictures")
