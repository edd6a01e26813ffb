"""Records of dialogues with pictures, for tests of the formats in which they may be stored."""

import functools
import io
import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pytest
import tiny
from PIL import Image
from pyarrow import parquet

from omnifusion_jax.data.sources import JsonSource
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError

SHARED = Path(__file__).parents[1].parent / "shared/data"
REAL = SHARED / "real_dialogues"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no dialogues in {REAL}")


def picture(red, format="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (red, 0, 0)).save(file, format)
    return file.getvalue()


PICTURES = {"a.png": picture(1), "b.jpg": picture(90, "JPEG"), "c.png": picture(200)}
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat, \u043a\u043e\u0442"}]
TWO = [
    {"from": "human", "value": "<image>\n<image>\nWhich?"},
    {"from": "gpt", "value": "The first"},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes"},
]
ALONE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CONVERSATIONS = [
    {"id": "one", "images": ["a.png"], "conversations": TALK},
    {"id": "two", "images": ["c.png", "b.jpg"], "conversations": TWO},
    {"id": "none", "images": [], "conversations": ALONE},
    {"id": "null", "images": None, "conversations": ALONE},
    {"id": "more", "images": ["b.jpg"], "conversations": TALK},
]
ANSWER = {"role": "assistant", "content": "A cat"}
MESSAGES = [
    {"id": 1, "images": ["a.png"], "messages": [{"role": "user", "content": "What?"}, ANSWER]},
    {"id": 2, "images": [], "messages": [{"role": "user", "content": "Hi"}, ANSWER]},
]
QUESTION = [
    {"type": "image"},
    {"type": "text", "text": "and"},
    {"type": "image"},
    {"type": "text", "text": "?"},
]
PARTS = [
    {
        "images": ["c.png", "a.png"],
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": [{"type": "text", "text": "Two cats"}]},
        ],
    }
]


def as_json(folder, records, pictures=PICTURES) -> JsonSource:
    """The records with their pictures in files, as a source."""
    folder.mkdir(exist_ok=True)
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    (folder / "d.json").write_text(json.dumps(records), encoding="utf-8")
    return JsonSource(folder / "d.json", folder)


def same(found, expected):
    """Asserts that two sources hold the same dialogues and the same bytes of pictures."""
    assert len(found) == len(expected)
    for i in range(len(expected)):
        one, other = found[i], expected[i]
        assert (one.turns, one.marked, one.parted) == (other.turns, other.marked, other.parted)
        assert list(one.images) == [file.read_bytes() for file in other.images]


def real():
    """(records, {name: bytes of a picture}) of the real dialogues."""
    records = json.loads((REAL / "dialogues.json").read_text(encoding="utf-8"))
    names = {record["image"] for record in records if record.get("image")}
    return records, {name: (REAL / "images" / name).read_bytes() for name in names}


def refused(call, *words, reason=None):
    """Asserts that a call raises a DataError whose message has all of the words."""
    with pytest.raises(DataError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert reason in (None, caught.value.reason)


def same_samples(found):
    """Asserts that a source holds the real dialogues: prepared they are the same to the bit."""
    prepare, expected = expected_samples()
    assert len(found) == len(expected) == 24
    for i in range(24):
        arrays = zip(jax.tree.leaves(prepare(found[i])), jax.tree.leaves(expected[i]), strict=True)
        assert all(np.array_equal(a, b) and np.asarray(a).dtype == np.asarray(b).dtype for a, b in arrays)


@functools.cache
def expected_samples():
    prepare = tiny.prepare(Tokenizer(SHARED / "omnifusion_1_1"), 512, 48, 8)
    source = JsonSource(REAL / "dialogues.json", REAL / "images")
    return prepare, [prepare(source[i]) for i in range(len(source))]


# --- written as


def as_parquet(path, table, group=2):
    path.parent.mkdir(exist_ok=True, parents=True)
    parquet.write_table(table, path, row_group_size=group)


def as_arrow(path, table, make=pa.ipc.new_stream, **options):
    path.parent.mkdir(exist_ok=True, parents=True)
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=2)


def shard(path, members, **options):
    """Writes (name, bytes or what JSON can hold) as a tar file."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def members(records, pictures=PICTURES):
    """Samples of the records: pictures are numbered, records do not name them."""
    for n, record in enumerate(records):
        yield (
            f"set/{n:04}.json",
            {key: value for key, value in record.items() if key not in ("image", "images")},
        )
        names = record.get("images") or record.get("image") or []
        for i, name in enumerate([names] if isinstance(names, str) else names):
            yield f"set/{n:04}.{i}.{name.split('.')[-1]}", pictures[name]
