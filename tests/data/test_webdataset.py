"""Tar shards, written by tarfile, hold the dialogues that the same records in JSON hold."""

import gzip
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import (
    ALONE,
    CONVERSATIONS,
    MESSAGES,
    PARTS,
    TALK,
    TWO,
    as_json,
    members,
    needs_real,
    real,
    refused,
    same,
    same_samples,
    shard,
)

from omnifusion_jax.data.sources import TarSource, open_source, tar_index
from omnifusion_jax.data.sources import kept as kept_files
from omnifusion_jax.data.sources.files import in_range
from omnifusion_jax.errors import DataError


def opened(path):
    return open_source(str(path), "", 0)


def only(tmp_path, *content):
    """The only dialogue of a shard."""
    source = opened(shard(tmp_path / "d.tar", content))
    assert len(source) == 1
    return source[0]


# --- the same dialogues as in JSON


@pytest.mark.parametrize("records", [CONVERSATIONS, MESSAGES, PARTS], ids=["llava", "messages", "parts"])
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_same_dialogues_as_in_json(tmp_path, records, format):
    path = shard(tmp_path / "d.tar", members(records), format=format)
    found = opened(path)
    same(found, as_json(tmp_path / "json", records))
    assert [found.where(i) for i in range(len(records))] == [
        f"{path}:set/{n:04}" for n in range(len(records))
    ]


@needs_real
def test_the_real_dialogues_are_prepared_to_the_same_bit(tmp_path):
    records, pictures = real()
    content = list(members(records, pictures))
    shard(tmp_path / "set/shard-00.tar", content[:20])
    shard(tmp_path / "set/shard-01.tar", content[20:])
    same_samples(opened(tmp_path / "set"))


@pytest.mark.parametrize(
    ("given", "order"),
    [
        (["x.jpg", "x.png"], ["x.jpg", "x.png"]),
        (["x.png", "x.jpg"], ["x.png", "x.jpg"]),
        (["x.0.png", "x.png"], ["x.png", "x.0.png"]),
        (["x.10.png", "x.9.JPEG", "x.0.webp"], ["x.0.webp", "x.9.JPEG", "x.10.png"]),
        (["x.1.gif", "x.tiff", "x.left.bmp"], ["x.tiff", "x.left.bmp", "x.1.gif"]),
        (["./x.tif", "x.txt", "x.cls", "x.npy"], ["./x.tif"]),
        ([], []),
    ],
)
def test_the_order_of_pictures(tmp_path, given, order):
    for named in ({}, {"image": []}, {"images": None}):
        record = {"messages": MESSAGES[1]["messages"], **named}
        dialogue = only(tmp_path, *((name, name.encode()) for name in given), ("x.json", record))
        assert [image.decode() for image in dialogue.images] == order


@pytest.mark.parametrize(
    "fields", [{"image": "1.jpg"}, {"images": ["1.jpg"]}, {"image": None, "images": ["1.JPG"]}]
)
@pytest.mark.parametrize("before", ["", "a/x.", "x.", "other/folder/x."])
def test_pictures_that_are_named(tmp_path, fields, before):
    named = {key: rename(value, lambda name: before + name) for key, value in fields.items()}
    content = [("a/x.0.jpg", b"zero"), ("a/x.1.jpg", b"one"), ("a/x.json", {"conversations": TALK, **named})]
    assert only(tmp_path, *content).images == (b"one",)


def rename(value, change):
    return [*map(change, value)] if isinstance(value, list) else value and change(value)


def test_pictures_in_another_order_and_in_parts(tmp_path):
    pictures = [("x.0.jpg", b"zero"), ("x.1.jpg", b"one")]
    record = {"conversations": TWO, "images": ["1.jpg", "0.jpg"]}
    assert only(tmp_path, *pictures, ("x.json", record)).images == (b"one", b"zero")
    content = [{"type": "image_url", "image_url": {"url": "x.1.jpg"}}, {"type": "text", "text": "What?"}]
    record = {"messages": [{"role": "user", "content": content}, MESSAGES[0]["messages"][1]]}
    dialogue = only(tmp_path, *pictures, ("x.json", record))
    assert dialogue.images == (b"one",) and dialogue.turns[0] == ("user", "<image>\nWhat?")
    assert only(
        tmp_path, ("x.json", {"conversations": TALK, "image": "data:image/png;base64,AA=="})
    ).images == ("data:image/png;base64,AA==",)


def test_names_of_another_place_are_not_read(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "b/y.jpg"):
        content = [("a/x.jpg", b"x"), ("a/x.json", {"id": "i", "conversations": TALK, "image": name})]
        words = ['d.tar:a/x (id "i"): ', f"{name} is not one of the sample's pictures, a/x.jpg", "name none"]
        refused(lambda c=content: only(tmp_path, *c), *words, reason="missing")


def test_members_that_are_apart_and_others(tmp_path):
    path = tmp_path / "d.tar"
    content = [
        ("a.json", {"conversations": TALK}),
        ("b.json", {"conversations": ALONE}),
        ("a.png", b"a"),
        ("README", b""),
    ]
    shard(path, [*content, (".hidden.png", b""), ("sub.folder/a.json", {"conversations": ALONE})])
    found = opened(path)
    assert [found.where(i) for i in range(len(found))] == [
        f"{path}:{key}" for key in ("a", "b", "sub.folder/a")
    ]
    assert [found[i].images for i in range(3)] == [(b"a",), (), ()]


def test_long_names_and_names_that_are_no_text(tmp_path):
    long = "f" * 60 + "/" + "x" * 180
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = shard(
            tmp_path / "d.tar",
            [(f"{long}.json", {"conversations": TALK}), (f"{long}.jpg", b"x")],
            format=format,
        )
        assert opened(path)[0].images == (b"x",) and opened(path).where(0) == f"{path}:{long}"
    name = b"\xff\xd0".decode(errors="surrogateescape")
    content = [(f"{name}.json", {"conversations": TALK}), (f"{name}.jpg", b"x")]
    path = shard(tmp_path / "d.tar", content, format=tarfile.GNU_FORMAT, errors="surrogateescape")
    assert opened(path)[0].images == (b"x",) and opened(path).where(0) == f"{path}:\\udcff\\udcd0"


# --- shards


def test_a_folder_a_glob_and_a_range(tmp_path):
    folder = tmp_path / "set"
    shard(folder / "s-008.tar", members(CONVERSATIONS[:2]))
    shard(folder / "s-009.tar", members(CONVERSATIONS[2:4]))
    shard(folder / "s-010.tar", members(CONVERSATIONS[4:]))
    expected = as_json(tmp_path / "json", CONVERSATIONS)
    (folder / "s-011.tar").mkdir()  # a folder is no file, whatever its name
    for path in ("s-*.tar", "s-{008..010}.tar", "s-0{08..10}.tar"):
        same(opened(folder / path), expected)
    same(opened(tmp_path / "**/s-*.tar"), expected)
    (folder / "s-011.tar").rmdir()
    same(opened(folder), expected)
    assert len(opened(folder / "s-{010..010}.tar")) == 1
    assert len(opened(folder / "s-{009..010}.tar")) == 3
    refused(lambda: opened(folder / "s-{008..012}.tar"), "2 of its 5 files", "s-011.tar", reason="missing")
    refused(lambda: opened(folder / "s-{010..009}.tar"), "s-{010..009}.tar does not exist", reason="missing")
    refused(lambda: opened(folder / "none.tar"), "none.tar does not exist", reason="missing")
    assert isinstance(opened(f"webdataset:{folder}"), TarSource)
    assert in_range("{8..10}/s-{08..10}.tar")[::4] == ["8/s-08.tar", "9/s-09.tar", "10/s-10.tar"]


def test_sources_travel_to_other_processes_and_threads(tmp_path):
    for n in range(3):
        shard(tmp_path / f"set/{n}.tar", members(CONVERSATIONS))
    source = opened(tmp_path / "set")
    source[0]
    again = pickle.loads(pickle.dumps(source))
    again.file.size = 1  # so that shards are closed and opened all the time
    expected = as_json(tmp_path / "json", CONVERSATIONS)
    wanted = [(expected[i].turns, [file.read_bytes() for file in expected[i].images]) for i in range(5)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: (again[i % 15].turns, list(again[i % 15].images)), range(300)))
    assert found == wanted * 60


def test_few_files_are_open(tmp_path):
    for n in range(20):
        shard(tmp_path / f"set/{n:02}.tar", members(CONVERSATIONS))
    source = opened(tmp_path / "set")
    source.file.size = 3
    before = len(os.listdir("/proc/self/fd"))
    for i in range(len(source)):
        source[i]
    assert len(os.listdir("/proc/self/fd")) == before + 3


def test_the_fingerprint_is_that_of_the_text(tmp_path):
    one = opened(shard(tmp_path / "a/d.tar", members(CONVERSATIONS))).fingerprint
    assert opened(shard(tmp_path / "b/d.tar", members(CONVERSATIONS))).fingerprint == one
    other = [{**CONVERSATIONS[0], "id": "eno"}, *CONVERSATIONS[1:]]  # of the same length
    assert opened(shard(tmp_path / "c/d.tar", members(other))).fingerprint != one
    assert opened(shard(tmp_path / "d/d.tar", members(CONVERSATIONS[::-1]))).fingerprint != one
    longer = [(name, file + b" " if name.endswith("jpg") else file) for name, file in members(CONVERSATIONS)]
    assert opened(shard(tmp_path / "e/d.tar", longer)).fingerprint != one


# --- the index beside the shards


@pytest.fixture
def scanned(monkeypatch):
    """The shards that were looked through."""
    found, look = [], tar_index.samples_of
    monkeypatch.setattr(tar_index, "SMALL", 0)
    monkeypatch.setattr(tar_index, "samples_of", lambda path, n: found.append(path.name) or look(path, n))
    return found


def test_an_index_is_made_once(tmp_path, scanned):
    for n in range(2):
        shard(tmp_path / f"set/{n}.tar", members(CONVERSATIONS))
    first = opened(tmp_path / "set")
    (place,) = (tmp_path / "set").glob("*.index")
    travels = pickle.dumps(first)
    again = pickle.loads(travels)
    assert sorted(scanned) == ["0.tar", "1.tar"] and len(travels) < 1000
    assert [again[i] for i in range(10)] == [first[i] for i in range(10)]
    assert again.fingerprint == opened(tmp_path / "set").fingerprint and len(scanned) == 2
    opened(tmp_path / "set/0.tar")
    assert (tmp_path / "set/0.tar.index").is_file() and len(scanned) == 3
    data = place.read_bytes()
    for damaged in (data[:-1], b"hello", data.replace(b'"version": 1', b'"version": 0')):
        place.write_bytes(damaged)
        assert len(opened(tmp_path / "set")) == 10 and place.read_bytes() == data
    assert len(scanned) == 9


def test_changed_shards_are_looked_through_again(tmp_path, scanned):
    path = shard(tmp_path / "d.tar", members(CONVERSATIONS))
    travels = pickle.dumps(opened(path))
    shard(path, members(CONVERSATIONS[:2]))
    assert len(opened(path)) == 2
    refused(lambda: pickle.loads(travels), "shards were changed while they were being read")


def test_a_folder_that_cannot_be_written(tmp_path, scanned, monkeypatch):
    path = shard(tmp_path / "d.tar", members(CONVERSATIONS))
    (tmp_path / "d.tar.index/in use").mkdir(
        parents=True
    )  # so that no file can take its name, whoever runs the test
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(kept_files.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    assert len(opened(path)) == len(opened(path)) == 5 and len(scanned) == 1
    assert len(list((tmp_path / "temporary").glob("omnifusion-*.index"))) == 1


# --- what cannot be read


def test_a_bad_sample_does_not_spoil_the_others(tmp_path):
    good = {"conversations": ALONE}
    path = tmp_path / "d.tar"
    content = [
        ("none.jpg", b"x"),
        ("twice.json", good),
        ("twice.json", good),
        ("broken.json", b'{"a": '),
        ("bytes.json", b'{"a": "\xff"}'),
        ("list.json", [good]),
        ("marks.json", {"conversations": []}),
        ("good.json", good),
    ]
    source = opened(shard(path, content))
    words = {
        "none": ("there is no none.json in the shard", "form"),
        "twice": ("json is there twice", "twice"),
        "broken": ("not JSON", "not_json"),
        "bytes": ("not UTF-8", "not_utf8"),
        "list": ("this is a list", "form"),
        "marks": ("not a list of turns", "form"),
    }
    for i, (key, (word, reason)) in enumerate(words.items()):
        refused(lambda i=i: source[i], f"{path}:{key}: ", word, reason=reason)
    assert source[6].turns == (("human", "Hi"), ("gpt", "Hello"))
    refused(lambda: source[2], "Correct or remove the file")


def test_links_and_sparse_files_are_refused(tmp_path):
    """A program that packs a file twice may write a link the second time."""
    (tmp_path / "a.jpg").write_bytes(b"x")
    os.link(tmp_path / "a.jpg", tmp_path / "b.jpg")
    (tmp_path / "record").write_text(json.dumps({"conversations": TALK}))
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(tmp_path / f"{name}.jpg", f"{name}.jpg")
            tar.add(tmp_path / "record", f"{name}.json")
    source = opened(tmp_path / "d.tar")
    assert source[0].images == (b"x",)
    refused(lambda: source[1], f"{tmp_path}/d.tar:b: jpg is a link", "--hard-dereference", reason="link")


def test_a_shard_that_is_cut_off_anywhere(tmp_path):
    path = shard(tmp_path / "whole.tar", [(f"{i}.{end}", data) for i in range(3) for end, data in SAMPLE])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512  # of the data of the last member
    for length in range(0, end + 512, 256):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        if length < 512:
            refused(lambda: opened(tmp_path / "cut.tar"), "cut.tar is not a tar file", reason="damaged")
            continue
        source = opened(tmp_path / "cut.tar")
        last = len(source) - 1
        assert [source[i].images for i in range(last)] == [(b"x",)] * last
        refused(lambda s=source, i=last: s[i], f"cut.tar:{last}: its shard is cut off", reason="truncated")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])  # one of the two blocks of zeros at the end
    assert [opened(tmp_path / "cut.tar")[i].images for i in range(3)] == [(b"x",)] * 3


SAMPLE = (("json", {"conversations": TALK}), ("jpg", b"x"))


def test_a_header_that_is_damaged_loses_nothing_silently(tmp_path):
    """tarfile itself takes it as the end."""
    path = shard(tmp_path / "d.tar", [(f"{i}.{end}", data) for i in range(3) for end, data in SAMPLE])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        start = tar.getmembers()[4].offset
    data[start : start + 100] = b"\xff" * 100
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 4
    source = opened(path)
    assert len(source) == 2 and source[0].images == (b"x",)
    refused(
        lambda: source[1],
        "d.tar:1: its shard is cut off or damaged",
        "others may be lost",
        reason="truncated",
    )


def test_a_shard_that_ends_before_its_first_sample(tmp_path):
    whole = shard(tmp_path / "d.tar", [("README", b"x"), *members(CONVERSATIONS)]).read_bytes()
    (tmp_path / "d.tar").write_bytes(whole[:1024])
    refused(lambda: opened(tmp_path / "d.tar"), "damaged before its first sample", reason="damaged")


def test_a_negative_size_ends(tmp_path):
    path = shard(tmp_path / "d.tar", [("a.json", {"conversations": ALONE}), ("b.jpg", b"x" * 2000)])
    data = bytearray(path.read_bytes())
    start = 1024
    data[start + 124 : start + 136] = (-2048).to_bytes(12, "big", signed=True)
    data[start + 148 : start + 156] = b" " * 8
    data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    refused(lambda: opened(path)[0], "its shard is cut off or damaged", reason="truncated")


def test_compressed_and_other_files(tmp_path):
    path = shard(tmp_path / "d.tar", members(CONVERSATIONS))
    (tmp_path / "d.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "really.tar").write_bytes(gzip.compress(path.read_bytes()))
    for name in ("d.tar.gz", "really.tar"):
        refused(lambda n=name: opened(tmp_path / n), f"{name} is compressed", "gzip -d", reason="compressed")
    (tmp_path / "text.tar").write_text("not a tar file" * 100)
    refused(lambda: opened(tmp_path / "text.tar"), "text.tar is not a tar file", reason="damaged")
    refused(lambda: opened(shard(tmp_path / "empty.tar", [])), "empty.tar holds no dialogues")


def test_what_is_too_large_is_not_read(tmp_path, monkeypatch):
    path = shard(tmp_path / "d.tar", [("x.json", {"conversations": TALK}), ("x.jpg", b"x" * 5000)])
    monkeypatch.setattr("omnifusion_jax.data.sources.webdataset.MAX_FILE_BYTES", 4999)
    refused(lambda: opened(path)[0], "d.tar:x: a file of 5,000 bytes", reason="file_size")
    monkeypatch.setattr("omnifusion_jax.data.sources.webdataset.MAX_FILE_BYTES", 5000)
    assert opened(path)[0].images == (b"x" * 5000,)


def test_a_shard_that_is_cut_off_while_it_is_read(tmp_path):
    path = shard(tmp_path / "d.tar", [("x.json", {"conversations": TALK}), ("x.jpg", b"x" * 5000)])
    source = opened(path)
    os.truncate(path, 3000)
    refused(lambda: source[0], "d.tar:x: the shard is cut off here", reason="truncated")


def test_folders_are_no_members(tmp_path):
    """Whatever their names: programs that pack a folder write it too."""
    (tmp_path / "data.v1").mkdir()
    (tmp_path / "data.v1" / "x.json").write_text(json.dumps({"conversations": ALONE}))
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "data.v1", "data.v1")
    source = opened(tmp_path / "d.tar")
    assert len(source) == 1 and source.where(0) == f"{tmp_path}/d.tar:data.v1/x"


@settings(max_examples=60)
@given(st.data())
def test_damage_is_an_error_never_another_exception(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("d")
    path = shard(folder / "d.tar", [(f"{i}.{end}", content) for i in range(3) for end, content in SAMPLE])
    changed = bytearray(path.read_bytes()[:7168])
    for at in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=4)):
        changed[at] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        source = opened(path)
    except DataError:
        return
    for i in range(len(source)):
        try:
            assert source[i].turns
        except DataError as error:
            assert str(error).startswith(source.where(i))
