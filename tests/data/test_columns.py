"""Parquet and Arrow files, written by pyarrow, hold the dialogues that the same records in JSON hold."""

import json
import pickle
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from pyarrow import parquet
from records import (
    CONVERSATIONS,
    MESSAGES,
    PARTS,
    PICTURES,
    as_arrow,
    as_json,
    as_parquet,
    needs_real,
    real,
    refused,
    same,
    same_samples,
)

from omnifusion_jax.data.sources import ColumnSource, arrow_file, columns, open_source
from omnifusion_jax.data.sources.recent import Recent

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
TURN = pa.struct({"from": pa.string(), "value": pa.string()})


def held(name):
    return {"bytes": PICTURES[name], "path": name}


def with_bytes(records, hold=held):
    """The records with their pictures inside."""
    return [
        {**r, "images": None if r["images"] is None else [hold(name) for name in r["images"]]}
        for r in records
    ]


def opened(path, images=""):
    return open_source(str(path), str(images), 0)


def as_arrow_file(path, table):
    as_arrow(path, table, pa.ipc.new_file)


WRITERS = [(".parquet", as_parquet), (".arrow", as_arrow), (".arrow", as_arrow_file)]
every_format = pytest.mark.parametrize(("suffix", "write"), WRITERS, ids=["parquet", "stream", "file"])


# --- the same dialogues as in JSON


@every_format
@pytest.mark.parametrize("records", [CONVERSATIONS, MESSAGES, PARTS], ids=["llava", "messages", "parts"])
def test_the_same_dialogues_as_in_json(tmp_path, suffix, write, records):
    path = tmp_path / f"d{suffix}"
    write(path, pa.Table.from_pylist(with_bytes(records)))
    found = opened(path)
    same(found, as_json(tmp_path / "json", records))
    assert [found.where(i) for i in range(len(records))] == [f"{path}[{i}]" for i in range(len(records))]
    if "id" in records[0]:
        assert found[1].where == f'{path}[1] (id "{records[1]["id"]}")'


@pytest.mark.parametrize(
    "pictures",
    [
        pa.array([held("a.png"), None], STRUCT),
        pa.array([PICTURES["a.png"], None], pa.binary()),
        pa.array([PICTURES["a.png"], None], pa.large_binary()),
        pa.array([[held("a.png")], []], pa.list_(STRUCT)),
        pa.array([[PICTURES["a.png"]], None], pa.list_(pa.binary())),
    ],
    ids=["struct", "binary", "large binary", "list of structs", "list of binaries"],
)
@pytest.mark.parametrize("column", ["image", "images"])
def test_the_types_that_a_picture_may_have(tmp_path, pictures, column):
    turns = pa.array([CONVERSATIONS[0]["conversations"], CONVERSATIONS[2]["conversations"]], pa.list_(TURN))
    as_parquet(tmp_path / "d.parquet", pa.table({column: pictures, "conversations": turns}))
    same(opened(tmp_path / "d.parquet"), as_json(tmp_path / "json", [CONVERSATIONS[0], CONVERSATIONS[2]]))


def test_pictures_that_are_named_lie_in_the_folder_of_pictures(tmp_path):
    expected = as_json(tmp_path / "json", CONVERSATIONS)
    as_parquet(tmp_path / "names.parquet", pa.Table.from_pylist(CONVERSATIONS))
    named = with_bytes(CONVERSATIONS, lambda name: {"bytes": None, "path": name})
    as_parquet(tmp_path / "paths.parquet", pa.Table.from_pylist(named, schema_of(named)))
    for name in ("names", "paths"):
        found = opened(tmp_path / f"{name}.parquet", tmp_path / "json")
        assert all(found[i].images == expected[i].images for i in range(5))


def schema_of(records):
    return pa.schema({"id": pa.string(), "images": pa.list_(STRUCT), "conversations": pa.list_(TURN)})


def test_what_is_null_in_a_part_was_not_written(tmp_path):
    url = {"type": "image_url", "image_url": {"url": "a.png"}}
    content = [url, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": [content[1]]}]
    table = pa.Table.from_pylist([{"messages": messages}])
    assert table.to_pylist()[0]["messages"][0]["content"][0]["text"] is None  # as the table has it
    as_parquet(tmp_path / "d.parquet", table)
    expected = as_json(tmp_path / "json", [{"messages": messages}])
    found = opened(tmp_path / "d.parquet", tmp_path / "json")
    assert (found[0].turns, found[0].images) == (expected[0].turns, expected[0].images)


def test_a_picture_may_be_a_struct_in_a_part(tmp_path):
    content = [{"type": "image", "image": {"bytes": PICTURES["a.png"], "path": None}}]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}]
    as_arrow(tmp_path / "d.arrow", pa.Table.from_pylist([{"messages": messages}]))
    dialogue = opened(tmp_path / "d.arrow")[0]
    assert dialogue.images == (PICTURES["a.png"],) and dialogue.turns == (("user", "<image>\nWhat?"),)


def test_the_cauldron(tmp_path):
    texts = [
        {"user": "Which?\nA or B", "assistant": "A", "source": "x"},
        {"user": "Sure?", "assistant": "Yes", "source": "x"},
    ]
    rows = [{"images": [held("c.png"), held("a.png")], "texts": texts}]
    as_parquet(tmp_path / "ai2d/train-00000-of-00001-2ce340398c113b79.parquet", pa.Table.from_pylist(rows))
    turns = [message for pair in texts for message in (pair["user"], pair["assistant"])]
    messages = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, turns, strict=True)
    ]
    same(
        opened(tmp_path / "ai2d"),
        as_json(tmp_path / "json", [{"images": ["c.png", "a.png"], "messages": messages}]),
    )
    refused(lambda: opened(tmp_path), "has no .parquet files", "Give a folder in it: ai2d")


def test_a_sequence_of_datasets_is_a_struct_of_lists(tmp_path):
    rows = [{"id": r["id"], "conversations": columns_of(r["conversations"])} for r in CONVERSATIONS[2:4]]
    rows.append({"id": "bad", "conversations": {"from": ["human", "gpt"], "value": ["Hi"]}})
    as_parquet(tmp_path / "d.parquet", pa.Table.from_pylist(rows))
    found = opened(tmp_path / "d.parquet")
    assert found[1].turns == (("human", "Hi"), ("gpt", "Hello")) and found[1].marked
    refused(
        lambda: found[2], f"{tmp_path}/d.parquet[2]: 'conversations'", "lists of one length", reason="form"
    )


def columns_of(turns):
    return {key: [turn[key] for turn in turns] for key in turns[0]}


def test_a_row_may_have_the_form_of_another_column(tmp_path):
    rows = [{**CONVERSATIONS[3], "messages": None}, {**MESSAGES[1], "id": "m", "conversations": None}]
    as_parquet(tmp_path / "d.parquet", pa.Table.from_pylist(rows))
    found = opened(tmp_path / "d.parquet")
    assert [found[0].marked, found[1].marked] == [True, False]
    assert found[1].turns == (("user", "Hi"), ("assistant", "A cat"))


@needs_real
@every_format
def test_the_real_dialogues_are_prepared_to_the_same_bit(tmp_path, suffix, write):
    records, pictures = real()
    rows = [
        {**r, "image": {"bytes": pictures[r["image"]], "path": r["image"]} if r.get("image") else None}
        for r in records
    ]
    write(tmp_path / f"d{suffix}", pa.Table.from_pylist(rows))
    same_samples(opened(tmp_path / f"d{suffix}"))


# --- files


def shards(folder, suffix, write, name="train"):
    """Five dialogues in two files, of several row groups or batches."""
    table = pa.Table.from_pylist(with_bytes(CONVERSATIONS))
    write(folder / f"{name}-00000-of-00002{suffix}", table.slice(0, 3))
    write(folder / f"{name}-00001-of-00002{suffix}", table.slice(3))


@every_format
@pytest.mark.parametrize("inside", [".", "data"])
def test_a_folder_and_a_glob(tmp_path, suffix, write, inside):
    folder = tmp_path / "set"
    shards(folder / inside if inside == "data" else folder, suffix, write)
    (folder / f"._a{suffix}").write_bytes(b"left by a Mac")
    expected = as_json(tmp_path / "json", CONVERSATIONS)
    same(opened(folder), expected)
    same(opened(folder / inside / f"train-*{suffix}"), expected)
    assert opened(folder).where(4) == f"{(folder / inside).resolve()}/train-00001-of-00002{suffix}[1]"
    same(opened(folder / inside / f"train-0000{{0..1}}-of-00002{suffix}"), expected)


def test_a_folder_that_datasets_saved(tmp_path):
    folder = tmp_path / "saved"
    shards(folder, ".arrow", as_arrow, "data")
    as_arrow(
        folder / "cache-0123.arrow", pa.table({"indices": [1, 2]})
    )  # what its map and filter leave there
    state = {"_data_files": [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    same(opened(folder), as_json(tmp_path / "json", CONVERSATIONS))
    (folder / "data-00001-of-00002.arrow").unlink()
    refused(lambda: opened(folder), "lacks data-00001-of-00002.arrow", reason="missing")
    (folder / "state.json").write_text("[]")
    refused(lambda: opened(folder), "state.json is damaged")
    (tmp_path / "dataset_dict.json").write_text("{}")
    refused(lambda: opened(tmp_path), "holds several splits, saved: give the folder of one")


def test_folders_whose_files_do_not_belong_together(tmp_path):
    shards(tmp_path / "splits", ".parquet", as_parquet)
    shards(tmp_path / "splits", ".parquet", as_parquet, "test")
    one = f"{tmp_path}/splits/test-*-of-00002*.parquet"
    refused(lambda: opened(tmp_path / "splits"), "several sets of files", f"give one, e.g. {one}")
    assert len(opened(one)) == 5
    shards(tmp_path / "part", ".parquet", as_parquet)
    (tmp_path / "part/train-00000-of-00002.parquet").unlink()
    refused(lambda: opened(tmp_path / "part"), "some are missing", reason="missing")
    shards(tmp_path / "other", ".parquet", as_parquet)
    as_parquet(tmp_path / "other/old.parquet", pa.Table.from_pylist(CONVERSATIONS))
    refused(lambda: opened(tmp_path / "other"), "others stand beside them")
    as_arrow(tmp_path / "both/d.arrow", pa.Table.from_pylist(CONVERSATIONS))
    as_parquet(tmp_path / "both/d.parquet", pa.Table.from_pylist(CONVERSATIONS))
    refused(lambda: opened(tmp_path / "both"), f"arrow:{tmp_path}/both or parquet:{tmp_path}/both")
    assert len(open_source(f"parquet:{tmp_path}/both", "", 0)) == 5
    refused(
        lambda: opened(tmp_path / "both/{0..2}.parquet"), "3 of its 3 files do not exist", "both/0.parquet"
    )
    refused(lambda: opened(tmp_path / "no*.parquet"), "no*.parquet does not exist", reason="missing")
    (tmp_path / "empty").mkdir()
    refused(lambda: open_source(f"arrow:{tmp_path}/empty", "", 0), "empty has no .arrow files")


def test_a_folder_of_json_is_refused_as_before(tmp_path):
    as_json(tmp_path / "json", CONVERSATIONS)
    refused(lambda: opened(tmp_path / "json"), "is a folder: give the file in it, e.g.", "d.json")


# --- reading


@every_format
def test_sources_travel_to_other_processes(tmp_path, suffix, write):
    shards(tmp_path / "set", suffix, write)
    source = opened(tmp_path / "set")
    source[0]
    travels = pickle.dumps(source)
    assert len(travels) < 3000  # neither pictures nor files
    again = pickle.loads(travels)
    assert again.fingerprint == source.fingerprint
    same(again, as_json(tmp_path / "json", CONVERSATIONS))
    write(tmp_path / f"set/train-00001-of-00002{suffix}", pa.Table.from_pylist(with_bytes(CONVERSATIONS[:2])))
    changed = pickle.loads(travels)
    refused(lambda: changed[4], "was changed while it was being read")


@every_format
def test_threads(tmp_path, suffix, write):
    shards(tmp_path / "set", suffix, write)
    source = opened(tmp_path / "set")
    source.part.size = 1  # so that parts are decoded again and again
    expected = [tuple((turn["from"], turn["value"]) for turn in r["conversations"]) for r in CONVERSATIONS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source[i % 5].turns, range(400)))
    assert found == expected * 80


def test_an_index_behind_the_last_is_an_index_error(tmp_path):
    as_parquet(tmp_path / "d.parquet", pa.Table.from_pylist(CONVERSATIONS))
    source = opened(tmp_path / "d.parquet", tmp_path)
    assert [dialogue.turns for dialogue in source] == [source[i].turns for i in range(5)]
    with pytest.raises(IndexError):
        source[5]


def test_other_columns_are_not_read(tmp_path):
    rows = with_bytes(CONVERSATIONS)
    others = {"texts": "never", "images.thumbnail": "never", "embedding": "never" * 1000}
    as_parquet(tmp_path / "d.parquet", pa.Table.from_pylist([{**row, **others} for row in rows]), group=5)
    expected = as_json(tmp_path / "json", CONVERSATIONS)
    with parquet.ParquetFile(tmp_path / "d.parquet") as file:
        group = file.metadata.row_group(0)
        chunks = [group.column(i) for i in range(group.num_columns)]
    data = bytearray((tmp_path / "d.parquet").read_bytes())
    for chunk in chunks:
        if chunk.path_in_schema in others:  # whoever reads them fails
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    (tmp_path / "d.parquet").write_bytes(data)
    with pytest.raises(OSError):
        parquet.read_table(tmp_path / "d.parquet")
    same(opened(tmp_path / "d.parquet"), expected)
    assert set(opened(tmp_path / "d.parquet").part(0).schema.names) == {"id", "images", "conversations"}


def test_a_row_group_is_decoded_once(tmp_path, monkeypatch):
    shards(tmp_path / "set", ".parquet", as_parquet)
    read, decoded = parquet.ParquetFile.read_row_group, []
    monkeypatch.setattr(
        parquet.ParquetFile,
        "read_row_group",
        lambda self, *a, **k: decoded.append(a[0]) or read(self, *a, **k),
    )
    source = opened(tmp_path / "set")
    for i in [0, 1, 0, 4, 3, 2, 1]:
        source[i]
    assert decoded == [0, 0, 1]  # two groups in the first file, one in the second


def test_what_is_kept_is_bounded(tmp_path, monkeypatch, capsys):
    as_parquet(tmp_path / "d.parquet", pa.Table.from_pylist(with_bytes(CONVERSATIONS)), group=1)
    source = opened(tmp_path / "d.parquet")
    assert capsys.readouterr().out == ""
    largest = source.files[0].bytes
    monkeypatch.setattr(columns, "KEPT", 2 * largest)
    monkeypatch.setattr(columns, "LARGE", largest - 1)
    source = opened(tmp_path / "d.parquet")
    for i in range(5):
        source[i]
    assert len(source.part.results) == 2
    said = capsys.readouterr().out
    assert "row groups hold up to 0 MB" in said and "omnifusion_jax.prepare_data" in said
    pickle.loads(pickle.dumps(source))
    assert capsys.readouterr().out == ""  # said once, by the process that opens it


def test_recent_calls_once_and_keeps_no_failure():
    calls = []

    def make(key):
        calls.append(key)
        if key == "bad":
            raise KeyError(key)
        return key * 2

    recent = Recent(make, 2)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(recent, ["a"] * 50)) == {"aa"} and calls == ["a"]
    for _ in range(2):
        with pytest.raises(KeyError):
            recent("bad")
    assert [recent(key) for key in "bcbabc"] == ["bb", "cc", "bb", "aa", "bb", "cc"]
    assert calls == ["a", "bad", "bad", "b", "c", "a", "c"]  # the one asked for longest ago goes first


@every_format
def test_the_fingerprint_is_that_of_the_data(tmp_path, suffix, write):
    shards(tmp_path / "one", suffix, write)
    shards(tmp_path / "two", suffix, write)
    shards(tmp_path / "other", suffix, write)
    other = with_bytes([*CONVERSATIONS[3:4], {**CONVERSATIONS[4], "id": "MORE"}])
    write(tmp_path / f"other/train-00001-of-00002{suffix}", pa.Table.from_pylist(other))
    one, two, third = (opened(tmp_path / name).fingerprint for name in ("one", "two", "other"))
    assert one == two != third
    (tmp_path / f"two/train-00000-of-00002{suffix}").rename(tmp_path / f"two/a{suffix}")
    (tmp_path / f"two/train-00001-of-00002{suffix}").rename(tmp_path / f"two/b{suffix}")
    assert opened(tmp_path / "two").fingerprint != one


def test_a_table_is_not_imported_before_it_is_read():
    code = "import sys, omnifusion_jax.data.sources; sys.exit('pyarrow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what cannot be read


@every_format
def test_columns_that_are_missing_or_differ(tmp_path, suffix, write):
    write(tmp_path / f"d{suffix}", pa.table({"id": [1], "question": ["What?"]}))
    words = ["no column 'conversations', 'messages', 'texts', ", "only id, question"]
    refused(lambda: opened(tmp_path / f"d{suffix}"), f"{tmp_path}/d{suffix}: ", *words, reason="form")
    write(tmp_path / f"one/a{suffix}", pa.Table.from_pylist(CONVERSATIONS))
    write(tmp_path / f"one/b{suffix}", pa.Table.from_pylist(CONVERSATIONS).drop_columns(["images"]))
    refused(
        lambda: opened(tmp_path / "one"),
        f"b{suffix} has the columns",
        f"a{suffix} has id, images",
        reason="form",
    )
    table = pa.Table.from_pylist(CONVERSATIONS)
    write(tmp_path / f"one/b{suffix}", table.select(["conversations", "images", "id"]))
    assert len(opened(tmp_path / "one")) == 10  # in another order they are the same
    twice = pa.Table.from_arrays([*table.columns, table["id"]], names=[*table.schema.names, "id"])
    write(tmp_path / f"twice{suffix}", twice)
    refused(lambda: opened(tmp_path / f"twice{suffix}"), "several columns have one name", reason="form")
    write(tmp_path / f"none{suffix}", table.slice(0, 0))
    refused(lambda: opened(tmp_path / f"none{suffix}"), "holds no dialogues")


@every_format
def test_a_row_that_cannot_be_used_does_not_spoil_the_others(tmp_path, suffix, write):
    rows = with_bytes(CONVERSATIONS[:1]) * 5
    rows[1] = {**rows[1], "conversations": None}
    rows[3] = {**rows[3], "conversations": [{"from": "human", "value": None}]}
    write(tmp_path / f"d{suffix}", pa.Table.from_pylist(rows))
    source = opened(tmp_path / f"d{suffix}")
    refused(lambda: source[1], f"{tmp_path}/d{suffix}[1]", "neither 'conversations'", reason="form")
    refused(lambda: source[3], f"{tmp_path}/d{suffix}[3]", "conversations[0]", reason="form")
    assert source[0].turns == source[2].turns == source[4].turns


@every_format
def test_files_that_are_cut_off(tmp_path, suffix, write):
    write(tmp_path / f"d{suffix}", pa.Table.from_pylist(with_bytes(CONVERSATIONS)))
    whole = (tmp_path / f"d{suffix}").read_bytes()
    for length in [0, 5, len(whole) // 2, *range(len(whole) - 20, len(whole))]:
        (tmp_path / f"cut{suffix}").write_bytes(whole[:length])
        refused(
            lambda: opened(tmp_path / f"cut{suffix}"), f"{tmp_path}/cut{suffix}: ", "Copy", reason="damaged"
        )
    (tmp_path / f"text{suffix}").write_bytes(b"not a table at all\n" * 100)
    refused(lambda: opened(tmp_path / f"text{suffix}"), f"{tmp_path}/text{suffix}: ", reason="damaged")


def test_a_stream_that_ends_between_two_batches(tmp_path):
    """pyarrow itself takes it as complete."""
    table = pa.Table.from_pylist(with_bytes(CONVERSATIONS))
    as_arrow(tmp_path / "d.arrow", table.slice(0, 2))
    first = (tmp_path / "d.arrow").read_bytes()[:-8]
    as_arrow(tmp_path / "d.arrow", table)
    assert (tmp_path / "d.arrow").read_bytes().startswith(first)
    (tmp_path / "d.arrow").write_bytes(first)
    assert pa.ipc.open_stream(first).read_all().num_rows == 2
    refused(lambda: opened(tmp_path / "d.arrow"), "cut off, or not yet complete", reason="damaged")


def test_a_damaged_row_group_spoils_its_own_rows(tmp_path):
    as_parquet(tmp_path / "d.parquet", pa.Table.from_pylist(with_bytes(CONVERSATIONS)))
    with parquet.ParquetFile(tmp_path / "d.parquet") as file:
        chunk = file.metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "d.parquet").read_bytes())
    data[chunk.dictionary_page_offset : chunk.dictionary_page_offset + 20] = b"\xff" * 20
    (tmp_path / "d.parquet").write_bytes(data)
    source = opened(tmp_path / "d.parquet")
    for i in (2, 3):
        refused(
            lambda i=i: source[i], f"{tmp_path}/d.parquet[{i}]: cannot be read as Parquet", reason="damaged"
        )
    assert [source[i].turns[0][0] for i in (0, 1, 4)] == ["human"] * 3


def test_damage_that_a_checksum_shows(tmp_path):
    """It would be read as another text."""
    table = pa.Table.from_pylist([{"conversations": CONVERSATIONS[2]["conversations"]}])
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    parquet.write_table(table, tmp_path / "d.parquet", **options)
    data = (tmp_path / "d.parquet").read_bytes()
    source = opened(tmp_path / "d.parquet")
    assert source[0].turns == (("human", "Hi"), ("gpt", "Hello"))
    at = data.index(b"\x05\0\0\0Hello")
    (tmp_path / "d.parquet").write_bytes(data[:at] + b"\x05\0\0\0Jello" + data[at + 9 :])
    refused(lambda: opened(tmp_path / "d.parquet")[0], "[0]: cannot be read as Parquet", reason="damaged")


def test_a_damaged_place_in_a_map_is_an_error_not_the_end(tmp_path):
    turns = pa.array([MESSAGES[0]["messages"]] * 3)
    as_arrow(
        tmp_path / "d.arrow", pa.table({"messages": turns, "id": ["abc", "def", "ghi"]}).combine_chunks()
    )
    data = (tmp_path / "d.arrow").read_bytes()
    at = data.index(struct.pack("<3i", 0, 3, 6))  # where the ids of the first batch begin and end
    (tmp_path / "d.arrow").write_bytes(data[:at] + struct.pack("<3i", 0, 1 << 30, 6) + data[at + 12 :])
    source = opened(tmp_path / "d.arrow")
    refused(lambda: source[0], f"{tmp_path}/d.arrow[0]: cannot be read as Arrow", reason="damaged")
    assert source[2].where.endswith('[2] (id "ghi")')


def test_text_that_is_not_utf8(tmp_path):
    texts = pa.array([b"fine", b"\xff\xd0"]).cast(pa.binary()).view(pa.string())
    turns = pa.ListArray.from_arrays(
        [0, 1, 2], pa.StructArray.from_arrays([pa.array(["human"] * 2), texts], ["from", "value"])
    )
    as_parquet(tmp_path / "d.parquet", pa.table({"conversations": turns}))
    source = opened(tmp_path / "d.parquet")
    assert source[0].turns == (("human", "fine"),)
    refused(lambda: source[1], f"{tmp_path}/d.parquet[1]: ", "utf-8", reason="damaged")


def test_compressed_arrow_files_are_read_if_they_are_small(tmp_path, monkeypatch):
    table = pa.Table.from_pylist(with_bytes(CONVERSATIONS))
    options = {"options": pa.ipc.IpcWriteOptions(compression="lz4")}
    as_arrow(tmp_path / "d.arrow", table, **options)
    as_arrow(tmp_path / "plain.arrow", table)
    same(opened(tmp_path / "d.arrow"), as_json(tmp_path / "json", CONVERSATIONS))
    monkeypatch.setattr(arrow_file, "COPIED", 0)
    refused(lambda: opened(tmp_path / "d.arrow"), "is compressed", "Save it without", reason="compressed")
    assert len(opened(tmp_path / "plain.arrow")) == 5  # nothing of it is copied


def test_source_is_a_row_by_name(tmp_path):
    as_parquet(tmp_path / "named_otherwise", pa.Table.from_pylist(CONVERSATIONS))
    assert isinstance(open_source(f"parquet:{tmp_path}/named_otherwise", "", 0), ColumnSource)
