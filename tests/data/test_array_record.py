"""Folders of ArrayRecord files: read as they were written, here by ArrayRecord and msgpack themselves."""

import dataclasses
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.data.sources import ArrayRecordSource, array_record, open_source
from omnifusion_jax.errors import DataError

COUNTS = (3, 0, 4)  # records of each shard


def record(i):
    return {
        "where": f'd.json[{i}] (id "\ud83d")',
        "turns": [["user", f"<image>\nЧто это? {i}"], ["assistant", "\x00 a cat"]],
        "media": [["image", bytes([i]) * 5000], ["sound", b""]][: i % 3],
        "marked": i % 2 == 0,
        "parted": i % 2 == 1,
    }


def dialogue(i):
    said = record(i)
    turns = tuple(map(tuple, said["turns"]))
    media = tuple(Media(stream, data) for stream, data in said["media"])
    return Dialogue(said["where"], turns, media, said["marked"], said["parted"])


def pack(value):
    return msgpack.packb(value, unicode_errors="surrogatepass")


def write(folder, records, **changes):
    """Shards of `records`, a list of bytes, and their dataset.json."""
    folder.mkdir(exist_ok=True)
    shards, left = [], iter(records)
    for number, count in enumerate(COUNTS):
        file = folder / f"d-{number}.array_record"
        writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        for _ in range(count):
            writer.write(next(left))
        writer.close()
        shards.append({"file": file.name, "records": count, "bytes": file.stat().st_size})
    said = {"format": "omnifusion_jax dialogues", "version": 1, "fingerprint": "f1", "shards": shards}
    said |= {"records": sum(COUNTS), "media": {}, "bytes": 0, "skipped": {}, "made_from": {}}
    (folder / "dataset.json").write_text(json.dumps(said | changes))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data", [pack(record(i)) for i in range(7)])


def test_dialogues_read_as_they_were_written(folder):
    source = open_source(str(folder), "", 0)
    assert isinstance(source, ArrayRecordSource) and len(source) == 7 and source.fingerprint == "f1"
    assert [source[i] for i in range(7)] == [dialogue(i) for i in range(7)]
    assert [source.where(i) for i in (0, 2, 3, 6)] == [
        f"{folder}/d-0.array_record[0]",
        f"{folder}/d-0.array_record[2]",
        f"{folder}/d-2.array_record[0]",
        f"{folder}/d-2.array_record[3]",
    ]
    assert len(open_source(f"array_record:{folder}", "", 0)) == 7
    for i in (-1, 7):
        with pytest.raises(IndexError):
            source[i]


def test_threads_and_copies_in_other_processes(folder, monkeypatch):
    monkeypatch.setattr(array_record, "OPEN", 1)
    source = ArrayRecordSource(folder)
    source[0]
    source = pickle.loads(pickle.dumps(source))
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.__getitem__, [i % 7 for i in range(700)]))
    assert found == [dialogue(i % 7) for i in range(700)]
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the shards that were read before are closed


def test_one_damaged_record(folder):
    file = folder / "d-0.array_record"
    data = bytearray(file.read_bytes())
    data[data.index(bytes([1]) * 5000) + 2500] ^= 1
    file.write_bytes(data)
    source = ArrayRecordSource(folder)
    with pytest.raises(DataError, match=r"d-0\.array_record\[1\]: the record is damaged") as error:
        source[1]
    assert error.value.reason == "damaged"
    assert [source[i] for i in (0, 2, 3)] == [dialogue(i) for i in (0, 2, 3)]


NO_DIALOGUES = {
    "not msgpack": b"\xc1",
    "cut off": pack(record(2))[:-3],
    "another type": pack([1, 2]),
    "a turn of three": pack(record(2) | {"turns": [["user", "a", "b"]]}),
    "without media": pack({name: value for name, value in record(2).items() if name != "media"}),
    "a TensorFlow example": b"\n\x0f\n\r\n\x02id\x12\x07\n\x05\n\x03abc",
}


@pytest.mark.parametrize("data", NO_DIALOGUES.values(), ids=NO_DIALOGUES)
def test_a_record_that_is_no_dialogue(tmp_path, data):
    source = ArrayRecordSource(write(tmp_path / "d", [pack(record(0)), data, *[pack(record(2))] * 5]))
    with pytest.raises(DataError, match=r"d-0\.array_record\[1\]: the record is no dialogue"):
        source[1]
    assert source[0] == dialogue(0)


def test_missing_and_broken_shards(folder):
    file = folder / "d-2.array_record"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"d-2\.array_record is cut off: [\d,]+ bytes of the [\d,]+"):
        ArrayRecordSource(folder)
    file.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=r"d-2\.array_record is changed"):
        ArrayRecordSource(folder)
    file.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))  # no end, the same size
    source = ArrayRecordSource(folder)
    with pytest.raises(DataError, match=r"holds 0 records that can be read, dataset\.json says 4"):
        source[5]
    file.unlink()
    with pytest.raises(DataError, match=r"d-2\.array_record is missing") as error:
        ArrayRecordSource(folder)
    assert error.value.reason == "missing"


def test_a_shard_that_goes_while_it_is_read(folder):
    source = ArrayRecordSource(folder)
    (folder / "d-2.array_record").unlink()
    with pytest.raises(DataError, match="is missing"):
        source[3]
    assert source[2] == dialogue(2)


def changed(folder, **changes):
    said = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(said | changes))


def test_another_number_of_records(folder):
    shards = ArrayRecordSource(folder).shards
    changed(folder, shards=[dict(shards[0], records=2), *shards[1:]])
    with pytest.raises(DataError, match=r"holds 3 records that can be read, dataset\.json says 2"):
        ArrayRecordSource(folder)[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": 2}, "is of version 2, read are those of 1"),
        ({"format": "another"}, "damaged, or was not written by prepare_data"),
        ({"shards": [{"file": "../d-0.array_record", "records": 1, "bytes": 1}]}, "which lies elsewhere"),
        ({"shards": []}, "damaged, or was not written"),
        ({"shards": [{"file": "d-0.array_record"}]}, "damaged, or was not written"),
        ({"fingerprint": None}, "damaged, or was not written"),
    ],
)
def test_a_dataset_json_that_cannot_be_used(folder, changes, message):
    changed(folder, **changes)
    with pytest.raises(DataError, match=message):
        ArrayRecordSource(folder)


def test_a_dataset_json_that_is_cut_off(folder):
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="damaged, or was not written"):
        open_source(str(folder), "", 0)


def test_folders_that_are_none_of_ours(folder, tmp_path):
    with pytest.raises(DataError, match=r"d-0\.array_record is a file: give the folder"):
        open_source(str(folder / "d-0.array_record"), "", 0)
    (folder / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"prepare_data did not write it.*tfds:FOLDER"):
        open_source(str(folder), "", 0)
    (folder / "unfinished").mkdir()
    with pytest.raises(DataError, match="is not complete: start the prepare_data command"):
        open_source(str(folder), "", 0)
    with pytest.raises(DataError, match="nowhere does not exist"):
        ArrayRecordSource(tmp_path / "nowhere")


def test_what_is_written_is_what_is_read():
    for i in range(7):
        assert array_record.packed(dialogue(i)) == pack(record(i))
        assert array_record.unpacked(pack(record(i)), "here") == dialogue(i)
    other = dataclasses.replace(dialogue(0), where="elsewhere")
    assert array_record.body(other) == array_record.body(dialogue(0))
