"""Two answers to a question as one Sample: what is laid out, which tokens changed, what is refused."""

import dataclasses
import difflib
import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from omnifusion_jax.batch import FEATURE, collate
from omnifusion_jax.data.dialogues import Dialogue
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.packing import Fullest
from omnifusion_jax.data.pairs import changed
from omnifusion_jax.data.pipeline import Batches, Read
from omnifusion_jax.data.readers import BadSample
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.sources.array_record import packed, unpacked
from omnifusion_jax.errors import DataError

TOKENS = st.lists(st.integers(0, 6), min_size=1, max_size=40)
EDITS = st.lists(st.tuples(st.integers(0, 39), st.integers(0, 4), TOKENS), max_size=3)


def by_opcodes(chosen, rejected):
    """The changed tokens as spans between matches of 3 tokens and more, from difflib's own opcodes."""
    a, b = list(rejected)[1:], list(chosen)[1:]
    codes = difflib.SequenceMatcher(None, a, b).get_opcodes()
    # matches next to each other cannot be: each run of equal tokens is one opcode
    kept = [code[1:] for code in codes if code[0] == "equal" and code[2] - code[1] >= 3]
    ours, theirs = [0.0] * len(chosen), [0.0] * len(rejected)
    edges = [(0, 0, 0, 0), *kept, (len(a), len(a), len(b), len(b))]
    for (_, a_start, _, b_start), (a_end, _, b_end, _) in itertools.pairwise(edges):
        if a_end > a_start and b_end > b_start:
            for i in range(a_start, a_end):
                theirs[i + 1] = 1.0
            for i in range(b_start, b_end):
                ours[i + 1] = 1.0
    return ours, theirs


@settings(max_examples=300, deadline=None)
@given(rejected=TOKENS, edits=EDITS)
def test_changed_tokens_are_those_between_matches_of_difflib(rejected, edits):
    chosen = list(rejected)
    for at, cut, new in edits:
        chosen[at : at + cut] = new[:5]
    found = changed(np.array(chosen, np.int32), np.array(rejected, np.int32))
    assert [column.tolist() for column in found] == list(by_opcodes(chosen, rejected))


def test_changed_by_hand():
    same, row = [1, 2, 3, 4, 5], lambda *ids: np.array([0, *ids], np.int32)
    ours, theirs = changed(row(*same, 7, 8, *same), row(*same, 9, *same))
    assert ours.nonzero()[0].tolist() == [6, 7] and theirs.nonzero()[0].tolist() == [6]
    # what one of them merely has more is not weighted, nor is the first token, which is not compared
    assert not any(column.any() for column in changed(row(*same, 7, *same), row(*same, *same)))
    assert not any(column.any() for column in changed(row(*same), np.array([9, *same], np.int32)))
    # two equal tokens between changes are no match of their own
    ours, _ = changed(row(*same, 7, 1, 2, 8, *same), row(*same, 9, 1, 2, 6, *same))
    assert ours.nonzero()[0].tolist() == [6, 7, 8, 9]


def prepare(tokenizer, max_length=80, **settings):
    return Prepare.of(tokenizer, tiny.config(), max_length, pairs=True, **settings)


PICTURE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
TALK = (("user", "What is it?"), ("assistant", "A red circle."))


def pair(rejected="A blue square.", turns=TALK, picture=PICTURE):
    media = tiny.shown(*([] if picture is None else [picture]))
    return Dialogue("here", turns, media, rejected=rejected)


@pytest.mark.parametrize("name", ["omnifusion", "text"])
def test_both_answers_are_laid_out_as_each_alone_and_show_one_picture(tokenizer, name):
    made = dataclasses.replace(tiny.config(), layout=name)
    both, alone = (Prepare.of(tokenizer, made, 80, pairs=pairs) for pairs in (True, False))
    sample = both(pair())
    single = [
        alone(Dialogue("here", (TALK[0], ("assistant", text)), tiny.shown(PICTURE)))
        for text in ("A red circle.", "A blue square.")
    ]
    assert sample.parts == tuple(len(one.tokens) for one in single)
    for column in ("tokens", "kind", "index", "weights"):
        expected = np.concatenate([getattr(one, column) for one in single])
        np.testing.assert_array_equal(getattr(sample, column), expected)
    assert len(sample.media["image"][0]) == sample.items == 1


def test_only_the_last_answers_are_targets(tokenizer):
    said = ("What?", "A blue square.", "How many?", "One.", "Where?", "There.")
    turns = tuple((("user", "assistant")[i % 2], text) for i, text in enumerate(said))
    sample = prepare(tokenizer, 160)(pair("To the left.", turns))
    columns = (np.split(column, sample.parts[:1]) for column in (sample.tokens, sample.weights))
    said = [tokenizer.decode(tokens[weights > 0]) for tokens, weights in zip(*columns, strict=True)]
    assert said == ["There.", "To the left."]


def test_a_row_holds_pairs_as_two_segments_each_with_one_picture(tokenizer):
    lay = prepare(tokenizer)
    other = PICTURE[::-1].copy()
    samples = [lay(pair()), lay(pair("Two circles.", picture=other))]
    length = sum(len(sample.tokens) for sample in samples) + 5
    samples[0] = samples[0]._replace(
        extra=samples[0].extra | {"more": np.ones(len(samples[0].tokens), np.float32)}
    )
    batch = collate([samples], length, lay.tiles)
    parts = [n for sample in samples for n in sample.parts]
    assert batch.segments[0].tolist() == [*np.repeat([1, 2, 3, 4], parts), *[0] * 5]
    assert batch.positions[0].tolist() == [*np.concatenate([np.arange(n) for n in parts]), *[0] * 5]
    rows = lay.tiles["image"].rows
    shown = [
        batch.index[0, (batch.segments[0] == k) & (batch.kind[0] == FEATURE)] // rows for k in (1, 2, 3, 4)
    ]
    assert [set(one.tolist()) for one in shown] == [{0}, {0}, {1}, {1}]
    assert batch.media["image"][0].shape[:2] == (1, 2)
    assert batch.extra["more"][0].tolist() == [1] * sum(samples[0].parts) + [0] * (
        length - sum(samples[0].parts)
    )


RECORD = {"question": "What is it?", "chosen": "A red circle.", "rejected": "A blue square."}


def png():
    with io.BytesIO() as file:
        Image.fromarray(PICTURE).save(file, "png")
        return file.getvalue()


def write_parquet(folder, rows):
    parquet.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet")
    return folder / "pairs.parquet"


def rlhf_v(folder):
    row = {"ds_name": "RLHF-V", "image": {"bytes": png(), "path": None}, "text": json.dumps(RECORD), "idx": 3}
    return write_parquet(folder, [row | {"origin_dataset": "LCS-558K", "image_path": "a.jpg"}])


def rlaif_v(folder):
    row = {"ds_name": "RLAIF-V", "image": {"bytes": png(), "path": "a.jpg"}, **RECORD, "idx": 3}
    return write_parquet(folder, [row | {"origin_split": "{}"}])


def jsonl(folder, **record):
    (folder / "a.png").write_bytes(png())
    (folder / "pairs.jsonl").write_text(json.dumps({"images": ["a.png"], **RECORD, **record}) + "\n")
    return folder / "pairs.jsonl"


def turns(folder):
    jsonl(folder)
    record = {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]}
    record |= {name: RECORD[name] for name in ("chosen", "rejected")}
    (folder / "turns.jsonl").write_text(json.dumps(record) + "\n")
    return folder / "turns.jsonl"


@pytest.mark.parametrize("form", [rlhf_v, rlaif_v, jsonl, turns])
def test_every_form_gives_the_same_pair(tokenizer, tmp_path, form):
    source = open_source(str(form(tmp_path)), str(tmp_path), 6)
    lay = prepare(tokenizer)
    found, expected = lay(source[0]), lay(pair())
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.media["image"][0], expected.media["image"][0])
    # the chosen answer is what a run with objective=answers would learn
    alone = Prepare.of(tokenizer, tiny.config(), 80)(source[0])
    np.testing.assert_array_equal(alone.tokens, expected.tokens[: expected.parts[0]])


def test_a_pair_survives_an_array_record():
    dialogue = dataclasses.replace(pair(picture=None), media=())
    assert unpacked(packed(dialogue), "here") == dialogue
    assert unpacked(packed(dataclasses.replace(dialogue, rejected=None)), "here").rejected is None


@pytest.mark.parametrize(
    ("record", "reason", "message"),
    [
        ({"rejected": ""}, "empty_side", r'pairs.jsonl:1 \(id "p"\): rejected is empty. Write its text'),
        ({"chosen": " \n"}, "empty_side", "chosen is empty"),
        ({"chosen": 3}, "form", "chosen is no string"),
        ({"rejected": ["No."]}, "form", "rejected is no string"),
        ({"rejected": RECORD["chosen"]}, "same", "chosen and rejected are the same in tokens"),
        ({"question": ""}, "empty_turn", "turn 0 is empty"),
        ({"question": None}, "form", "content"),
        ({"chosen": "red " * 60}, "too_long", "max_length"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_refused(tokenizer, tmp_path, record, reason, message):
    source = open_source(str(jsonl(tmp_path, id="p", **record)), str(tmp_path), 6)
    with pytest.raises(DataError, match=message) as error:
        prepare(tokenizer)(source[0])
    assert error.value.reason == reason


def test_a_pair_is_never_cut_and_one_answer_is_no_pair(tokenizer):
    long = (*TALK, ("user", "And?"), ("assistant", "red " * 60))
    with pytest.raises(
        DataError, match="with its chosen answer it has more tokens than max_length, 80"
    ) as error:
        prepare(tokenizer, cut=True)(pair(turns=long))
    assert error.value.reason == "too_long"
    with pytest.raises(DataError, match="there is one answer, and two are compared") as error:
        prepare(tokenizer)(pair(rejected=None))
    assert error.value.reason == "no_pair"


class Pairs:
    def __init__(self, *rejected):
        self.rejected = rejected

    def __len__(self):
        return len(self.rejected)

    def __getitem__(self, i):
        return dataclasses.replace(pair(self.rejected[i]), where=f"pairs[{i}]")


def test_a_pair_longer_than_a_row_is_too_long(tokenizer):
    lay = prepare(tokenizer)
    length = len(lay(pair()).tokens)
    assert isinstance(Read.of(Pairs("A blue square."), lay, Fullest(1, length, 9))(0), list)
    found = Read.of(Pairs("A blue square."), lay, Fullest(1, length - 1, 9))(0)
    problem = f"record 0: {length} tokens together, but data.row_length is {length - 1}. Raise it"
    assert found == BadSample(problem, "too_long")


def test_bad_pairs_are_left_out_and_counted(tokenizer):
    lay = prepare(tokenizer)
    source = Pairs("A blue square.", "A red circle.", "Two squares.", "One.")
    settings = {"length": 160, "tiles": lay.tiles, "choose": Fullest(2, 160, 4), "shuffle": False}
    batches = Batches(source, lay, batch_size=1, on_bad_sample="skip", bad_share=0.3, **settings)
    with_pairs = [next(batches) for _ in range(3)]
    assert batches.counts()["skipped"] == 1 and "the same in tokens" in batches.left_out()[0]
    assert all(set(batch.segments[0].tolist()) >= {1, 2} for batch in with_pairs)
    batches.close()
