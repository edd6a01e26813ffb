"""The index of a data file: every record where it is, whatever the size of the pieces that are read."""

import json
import os
import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from omnifusion_jax.data.sources import JsonSource, index
from omnifusion_jax.data.sources import kept as kept_files
from omnifusion_jax.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def pieces(path):
    """The bytes of each record of a file, and its line."""
    found = index.indexed(path)
    data = path.read_bytes()
    ends = zip(found.starts[:-1], found.starts[1:], strict=True)
    return [data[a:b] for a, b in ends], found.lines.tolist()


@given(
    values=st.lists(VALUES, min_size=1, max_size=5),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
    mark=st.booleans(),
)
@example(values=[0.5, -1e-30, 1e30], chunk=1, indent=None, ascii=True, mark=False)
def test_lists(tmp_path_factory, values, chunk, indent, ascii, mark):
    path = tmp_path_factory.mktemp("d") / "d.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    path.write_bytes(text.encode("utf-8-sig" if mark else "utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK", chunk)
        found, lines = pieces(path)
    assert [json.loads(one.decode("utf-8", "surrogatepass").rstrip(" \n,")) for one in found] == values
    starts = index.indexed(path).starts[:-1]
    assert lines == [path.read_bytes()[:start].count(b"\n") + 1 for start in starts.tolist()]


@given(
    lines=st.lists(
        st.sampled_from([b"", b" ", b"\t\r", b"{}", b' {"a": 1}', b"broken", "ж\u2028".encode()]), max_size=9
    ),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
    chunk=st.integers(1, 30),
    mark=st.booleans(),
)
def test_lines(tmp_path_factory, lines, end, last, chunk, mark):
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + end.join(lines) + (end if last else b""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "CHUNK", chunk)
        found, numbers = pieces(path)
    kept = [(line, n) for n, line in enumerate(lines, 1) if line.strip()]
    assert numbers == [n for _, n in kept]
    assert [one.strip() for one in found] == [line.strip() for line, _ in kept]


RECORDS = [{"id": str(i), "conversations": [{"from": "human", "value": "hi"}]} for i in range(20)]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A file whose index is kept beside it, and the list of the files that were looked through."""
    monkeypatch.setattr(index, "SMALL", 0)
    scanned, scan = [], index.elements_of
    monkeypatch.setattr(index, "elements_of", lambda chunks, path: scanned.append(path) or scan(chunks, path))
    path = tmp_path / "d.json"
    path.write_text(json.dumps(RECORDS))
    return path, scanned


def test_an_index_is_made_once(kept):
    path, scanned = kept
    first = JsonSource(path)
    assert path.with_name("d.json.index").stat().st_size == kept_files.HEADER + 8 * 21 + 4 * 20
    again = pickle.loads(pickle.dumps(JsonSource(path)))
    assert len(scanned) == 1
    assert [again[i].turns for i in range(20)] == [first[i].turns for i in range(20)]
    assert again.fingerprint == first.fingerprint and again.where(3) == f"{path}[3]"


@pytest.mark.parametrize("damage", ["cut", "not ours", "another version"])
def test_an_index_that_cannot_be_used_is_made_anew(kept, damage):
    path, scanned = kept
    JsonSource(path)
    place = path.with_name("d.json.index")
    data = place.read_bytes()
    changed = {
        "cut": data[:-1],
        "not ours": b"hello",
        "another version": data.replace(b'"version": 2', b'"version": 0'),
    }
    place.write_bytes(changed[damage])
    assert len(JsonSource(path)) == 20 and len(scanned) == 2 and place.read_bytes() == data


def test_a_changed_file_is_looked_through_again(kept):
    path, scanned = kept
    travels = pickle.dumps(JsonSource(path))
    path.write_text(json.dumps(RECORDS[:7]))
    assert len(JsonSource(path)) == 7 and len(scanned) == 2
    with pytest.raises(DataError, match="was changed while it was being read"):
        pickle.loads(travels)
    before = JsonSource(path).fingerprint
    path.write_text(json.dumps(RECORDS[:7]).replace("hi", "ho"))  # of the same size
    assert JsonSource(path).fingerprint != before and len(scanned) == 3


def test_a_folder_that_cannot_be_written(kept, monkeypatch, tmp_path):
    path, _ = kept
    monkeypatch.setattr(kept_files.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path.with_name("d.json.index").mkdir()  # so that no file can take its name, whoever runs the test
    (path.with_name("d.json.index") / "in use").touch()
    assert len(JsonSource(path)) == 20
    assert len(list((tmp_path / "temporary").glob("omnifusion-*.index"))) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"d.json", "d.json.index", "temporary"}
    monkeypatch.setattr(kept_files.tempfile, "gettempdir", lambda: str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"d\.json\.index can be written neither there nor to .*nowhere"):
        JsonSource(path)


def test_a_file_that_changes_while_it_is_looked_through(kept, monkeypatch):
    path, _ = kept
    scan = index.elements_of

    def slow(chunks, path):
        yield from scan(chunks, path)
        os.utime(path, ns=(0, 1))

    monkeypatch.setattr(index, "elements_of", slow)
    with pytest.raises(DataError, match=r"d\.json was changed while it was read"):
        JsonSource(path)


def test_a_bad_record_does_not_spoil_the_others(tmp_path):
    path = tmp_path / "d.jsonl"
    good = json.dumps(RECORDS[0]).encode()
    path.write_bytes(b"\n".join([good, b'{"a": "\xff"}', b"[" * 100_000, b"1" * 5000, b"\x00", good]))
    source = JsonSource(path)
    reasons = []
    for i in range(6):
        try:
            source[i]
        except DataError as error:
            assert str(error).startswith(f"{path}:{i + 1}")
            reasons.append((i, error.reason))
    assert reasons == [(1, "not_utf8"), (2, "not_json"), (3, "not_json"), (4, "not_json")]


def test_bytes_that_are_no_text_spoil_one_record_of_a_list(tmp_path):
    path = tmp_path / "d.json"
    good = json.dumps(RECORDS[0]).encode()
    path.write_bytes(b'[{"id": "\xff\xd0"},\n' + good + b"]")
    source = JsonSource(path)
    assert source[1].turns == (("human", "hi"),)
    with pytest.raises(DataError, match="not UTF-8"):
        source[0]
