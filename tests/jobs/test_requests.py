"""Requests come from any source: the same questions, the same ids, the same answers."""

import io
import json

import numpy as np
import pyarrow
import pytest
import tiny
from PIL import Image
from pyarrow import parquet
from rich.console import Console

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.prepared.folder import prepare_files
from omnifusion_jax.data.prepared.plan import planned
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.errors import DataError
from omnifusion_jax.inference.model import Model
from omnifusion_jax.jobs.answer_file import answer_file
from omnifusion_jax.jobs.progress import JobProgress
from omnifusion_jax.jobs.requests import open_requests

GREEDY = GenerationConfig(max_new_tokens=4)
TEXTS = ["What is it?", "How many circles?", "Left", "A red square", "Where?"]


@pytest.fixture(scope="module")
def model(tokenizer):
    c = tiny.shallow()
    return Model(c, tiny.arrays(c), tokenizer, name="tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same records as lines, as a list, as Parquet with the bytes of pictures, and as ArrayRecord."""
    folder = tmp_path_factory.mktemp("requests")
    records = []
    for i, text in enumerate(TEXTS):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        messages = [{"role": "user", "content": text}]
        records.append({"id": f"r{i}" if i != 3 else None, "images": [f"{i}.png"], "messages": messages})
    (folder / "in.json").write_text(json.dumps(records))
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bytes_of = lambda name: {"bytes": (folder / name).read_bytes(), "path": name}
    rows = [record | {"images": [bytes_of(name) for name in record["images"]]} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "in.parquet", row_group_size=2)
    source = open_source(str(folder / "in.jsonl"), str(folder), 3)
    plan = planned(source, "in.jsonl", str(folder), shard_records=2)
    prepare_files(source, folder / "in.array_record", plan, workers=1, skip=False)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", ["in.json", "in.parquet", "in.array_record"])
def test_the_same_requests_in_another_form_have_the_same_answers(model, folder, tmp_path, name):
    """A request without an id is called by its number, from 1 on; so is it in a file of lines."""
    for source in ("in.jsonl", name):
        answer_file(model, folder / source, tmp_path / f"{source}.out", folder, GREEDY, 2)
    rows = read(tmp_path / f"{name}.out")
    assert rows == read(tmp_path / "in.jsonl.out")
    assert [row["id"] for row in rows] == ["r0", "r1", "r2", "4", "r4"] and not any(r["error"] for r in rows)
    whole = (tmp_path / f"{name}.out").read_bytes()
    (tmp_path / f"{name}.out").write_bytes(whole[:-20])
    again = answer_file(model, folder / name, tmp_path / f"{name}.out", folder, GREEDY, 2)
    assert again == (5, 0, 4, 0, None) and (tmp_path / f"{name}.out").read_bytes() == whole


def test_other_files_under_the_same_name_are_not_gone_on_with(model, folder, tmp_path):
    """Their ids are the same; the fingerprint of the source tells them apart."""
    source, target = tmp_path / "in.parquet", tmp_path / "out.jsonl"
    rows = [{"id": str(i), "messages": [{"role": "user", "content": text}]} for i, text in enumerate(TEXTS)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    answer_file(model, source, target, "", GREEDY)
    rows[0]["messages"][0]["content"] = "Changed"
    parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    with pytest.raises(DataError, match="one of the first 5 requests was changed after it was answered"):
        answer_file(model, source, target, "", GREEDY)


def test_pictures_of_a_row_group_are_not_decoded_for_its_ids(model, folder, monkeypatch):
    requests = open_requests(folder / "in.parquet", "", model, 4)
    monkeypatch.setattr(type(requests.source), "read", lambda *_: pytest.fail("a whole row group was read"))
    assert [requests.name(i) for i in range(5)] == ["r0", "r1", "r2", "4", "r4"]


def test_workers_read_what_threads_do(model, folder, tmp_path):
    """A picture that is none is the error of one line, with worker processes too."""
    broken = folder / "broken.jsonl"
    lines = (folder / "in.jsonl").read_text().replace("1.png", "in.json")
    broken.write_text(lines)
    found = {}
    for workers in (0, 1):
        target = tmp_path / f"{workers}.jsonl"
        answer_file(model, broken, target, folder, GREEDY, 2, num_workers=workers)
        found[workers] = read(target)
    assert found[0] == found[1]
    assert [bool(row["error"]) for row in found[1]] == [False, True, False, False, False]


def test_whatever_a_line_holds_it_stops_no_other(model, folder, tmp_path, monkeypatch):
    """An exception that nobody thought of is the answer's error."""
    prepare, seen = type(model.prepare).__call__, []

    def unlucky(self, dialogue, ask=False):
        seen.append(dialogue)
        if "r2" in dialogue.where:
            raise OverflowError("a picture of a kind never seen")
        return prepare(self, dialogue, ask)

    monkeypatch.setattr(type(model.prepare), "__call__", unlucky)
    answer_file(model, folder / "in.jsonl", tmp_path / "out.jsonl", folder, GREEDY)
    errors = [row["error"] for row in read(tmp_path / "out.jsonl")]
    where = f"{folder / 'in.jsonl'}:3"
    assert errors == [None, None, f"{where}: OverflowError: a picture of a kind never seen", None, None]


def test_a_misspelt_picture_is_an_error_and_other_strange_keys_are_told_once(model, folder, tmp_path):
    ask = lambda text, **more: {"messages": [{"role": "user", "content": text}], **more}
    lines = [ask("1", category=1), ask("2", imagee="0.png"), ask("3", category=2, images=["0.png"]), ask("4")]
    source, target, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl", io.StringIO()
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    progress = JobProgress(Console(file=out, width=200))
    done = answer_file(model, source, target, folder, GREEDY, 2, progress=progress)
    assert (done.answers, done.errors, done.first) == (4, 1, 2)
    assert 'in.jsonl:2: nothing reads "imagee", and "image"' in read(target)[1]["error"]
    assert out.getvalue() == 'nothing reads "category" of the requests\n'


def test_a_source_without_an_end_is_refused(model):
    with pytest.raises(DataError, match="synthetic:captions has no end: give a file of requests"):
        open_requests("synthetic:captions", "", model, 4)
