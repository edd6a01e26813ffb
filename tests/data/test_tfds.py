"""TensorFlow Datasets: what it writes is read, and what is written it reads, both without TensorFlow."""

import io
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.data.prepared.plan import planned
from omnifusion_jax.data.prepared.tfds_files import write_tfds
from omnifusion_jax.data.sources import JsonSource, TfdsSource, open_source
from omnifusion_jax.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets")
KIND = tfds.features


def picture(i, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.full((9, 7 + i, 3), 10 * i, np.uint8)).save(file, kind)
    return file.getvalue() + bytes(i)  # as some files end


def texts(*keys):
    return KIND.Sequence({key: KIND.Text() for key in keys})


def build(folder, features, splits, **options):
    """What a builder of TFDS writes: {split: examples}. Returns the folder of the version."""

    class Mine(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "mine"  # of one in a package TFDS 4.9.10 looks for files by importlib_resources
        VERSION = tfds.core.Version("1.2.3")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=KIND.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, _):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    builder = Mine(data_dir=str(folder), file_format=options.get("file_format", "array_record"))
    builder.download_and_prepare()
    return folder / "mine" / "1.2.3"


LLAVA = {"id": KIND.Text(), "image": KIND.Image(), "conversations": texts("from", "value")}
OPENAI = {"images": KIND.Sequence(KIND.Image()), "messages": texts("role", "content")}


def llava(i):
    turns = [{"from": "human", "value": f"<image>\nЧто это? {i}"}, {"from": "gpt", "value": "A cat."}]
    return {"id": f"r{i}", "image": io.BytesIO(picture(i)), "conversations": turns}


def openai(i):
    turns = [("user", "What?"), ("assistant", "A cat."), ("user", ""), ("assistant", "It is.")][: 2 + i % 3]
    return {
        "images": [io.BytesIO(picture(k, "JPEG")) for k in range(i)],
        "messages": [{"role": role, "content": text} for role, text in turns],
    }


def test_llava_records(tmp_path):
    folder = build(tmp_path, LLAVA, {"train": [llava(i) for i in range(4)]})
    source = open_source(str(folder), "", 6)
    assert isinstance(source, TfdsSource) and len(source) == 4
    for i in range(4):
        turns = (("human", f"<image>\nЧто это? {i}"), ("gpt", "A cat."))
        media = (Media("image", picture(i)),)
        assert source[i] == Dialogue(f'{folder}#train[{i}] (id "r{i}")', turns, media, marked=True)
    assert source.where(3) == f"{folder}#train[3]"


def test_messages_with_any_number_of_pictures(tmp_path):
    folder = build(tmp_path, OPENAI, {"train": [openai(i) for i in range(4)]})
    source = open_source(f"tfds:{folder}", "", 6)
    for i in range(4):
        assert source[i].images == tuple(picture(k, "JPEG") for k in range(i))
        written = openai(i)["messages"]
        assert source[i].turns == tuple((turn["role"], turn["content"]) for turn in written)
        assert not source[i].marked and not source[i].parted


def test_splits(tmp_path):
    splits = {"train": [openai(i) for i in range(4)], "validation": [openai(2)]}
    folder = build(tmp_path, OPENAI, splits)
    lengths = {
        split: len(open_source(f"tfds:{folder}{split}", "", 6))
        for split in ("", "#train", "#validation", "#train[1:3]", "#train[50%:]")
    }
    assert lengths == {"": 4, "#train": 4, "#validation": 1, "#train[1:3]": 2, "#train[50%:]": 2}
    assert len(TfdsSource(f"{folder}#train[2:]")[0].images) == 2
    with pytest.raises(
        DataError, match=r"has no split 'test'; there are: train, validation\. It is written tfds:"
    ):
        open_source(f"tfds:{folder}#test", "", 6)
    with pytest.raises(DataError, match=r"train\[a:\] cannot be read"):
        open_source(f"tfds:{folder}#train[a:]", "", 6)
    only = build(tmp_path / "only", OPENAI, {"dialogues": [openai(1)]})
    assert TfdsSource(str(only)).where(0) == f"{only}#dialogues[0]"


def test_names_are_found_where_tfds_keeps_its_data(tmp_path, monkeypatch):
    folder = build(tmp_path, OPENAI, {"train": [openai(1)]})
    found = [open_source(f"tfds:mine{version}#train", str(tmp_path), 6) for version in ("", ":1.2.3")]
    assert [source.folder for source in found] == [folder, folder] and len(found[0]) == 1
    with pytest.raises(DataError, match="tfds:no_such_data: "):
        open_source("tfds:no_such_data", str(tmp_path), 6)
    with pytest.raises(
        DataError, match=r"tfds:mnist is not in .*tfds build mnist --file_format=array_record"
    ):
        open_source("tfds:mnist", str(tmp_path), 6)
    for elsewhere in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError, match=r"has no features\.json: give the folder of a version"):
            open_source(f"tfds:{elsewhere}", "", 6)
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    code = (
        "import sys; from omnifusion_jax.data.sources import open_source\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "source = open_source('tfds:mine', '', 6)\n"
        "assert source[0].turns and 'tensorflow' not in sys.modules and 'jax' not in sys.modules\n"
        "print(source.folder)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(folder), done.stderr


def test_other_features_are_not_looked_at(tmp_path):
    features = OPENAI | {"mask": KIND.Image(), "label": KIND.ClassLabel(names=["a", "b"])}
    broken = openai(1) | {"mask": b"no picture", "label": "b"}
    folder = build(tmp_path, features, {"train": [broken]})
    assert TfdsSource(str(folder))[0].images == (picture(0, "JPEG"),)


@pytest.mark.parametrize(
    "features, message",
    [
        ({"label": np.int64}, "neither 'conversations' nor 'messages' among its features, only label"),
        ({"messages": KIND.Sequence(KIND.Text())}, "its feature 'messages' is .*, not Sequence"),
        ({"messages": texts("role", "text")}, "its feature 'messages' is .*, not Sequence"),
        ({"conversations": texts("from", "value"), "image": KIND.Text()}, "'image' is Text.*, not Image"),
        (
            {"messages": texts("role", "content"), "image": KIND.Image(shape=(4, 4, 1), dtype=np.float32)},
            r"'image' is Image.*, not Image or Sequence\(Image\)",
        ),
        (
            {"messages": texts("role", "content"), "id": KIND.Sequence(np.int64)},
            "'id' is .*, not Text or a n",
        ),
    ],
)
def test_features_that_are_no_dialogues(tmp_path, features, message):
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity("mine", tfds.core.Version("1.0.0"), str(tmp_path), "here"),
        features=KIND.FeaturesDict(features),
    )
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.close_all()
    with pytest.raises(DataError, match=message):
        TfdsSource(str(tmp_path))


def test_a_part_without_records(tmp_path):
    folder = build(tmp_path, OPENAI, {"train": [openai(1)]})
    with pytest.raises(DataError, match=r"#train\[:0%\] holds no dialogues"):
        TfdsSource(f"{folder}#train[:0%]")


def test_numbers_as_ids(tmp_path):
    features = {"id": np.int64, "conversations": texts("from", "value")}
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    folder = build(tmp_path, features, {"train": [{"id": 7, "conversations": turns}]})
    assert TfdsSource(str(folder))[0].where == f'{folder}#train[0] (id "7")'


def test_threads_and_copies_in_other_processes(tmp_path):
    folder = build(tmp_path, OPENAI, {"train": [openai(i) for i in range(4)]})
    source = TfdsSource(str(folder))
    travels = pickle.dumps(source)
    again = pickle.loads(travels)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(again.__getitem__, [i % 4 for i in range(100)]))
    assert found == [source[i % 4] for i in range(100)]
    other = build(tmp_path / "other", OPENAI, {"train": [openai(i) for i in (0, 1, 3, 2)]})
    assert TfdsSource(str(other)).fingerprint != source.fingerprint == again.fingerprint
    assert TfdsSource(f"{folder}#train[:2]").fingerprint != source.fingerprint
    for file in other.glob("mine-train*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="was changed while it was being read"):
        pickle.loads(travels)


def test_a_damaged_record(tmp_path):
    folder = build(tmp_path, OPENAI, {"train": [openai(0), openai(3), openai(0)]})
    [file] = folder.glob("mine-train*")
    data = bytearray(file.read_bytes())
    data[700] ^= 1  # of the second record, of some 900 bytes
    file.write_bytes(data)
    source = TfdsSource(str(folder))
    results = []
    for i in range(3):
        try:
            results.append(len(source[i].images))
        except DataError as error:
            results.append(error.reason)
    assert results == [0, "damaged", 0]


def test_a_shard_that_is_missing_or_cut_off(tmp_path):
    folder = build(tmp_path, OPENAI, {"train": [openai(1)]})
    [file] = folder.glob("mine-train*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"#train\[0\]: the record is damaged"):
        TfdsSource(str(folder))[0]
    file.unlink()
    with pytest.raises(DataError, match=rf"#train cannot be read: .*{file.name}"):
        TfdsSource(str(folder))
    (folder / "features.json").write_text("{")
    with pytest.raises(DataError, match=r"1\.2\.3 cannot be read: "):
        TfdsSource(str(folder))


def test_files_that_are_not_read_at_random(tmp_path):
    folder = build(tmp_path, OPENAI, {"train": [openai(0)]})
    said = json.loads((folder / "dataset_info.json").read_text())
    assert said["fileFormat"] == "array_record"
    (folder / "dataset_info.json").write_text(json.dumps(said | {"fileFormat": "tfrecord"}))
    for file in folder.glob("mine-train*"):
        file.rename(folder / file.name.replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"is not of array_record files.*--file_format=array_record"):
        TfdsSource(str(folder))


def test_without_tfds(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    (tmp_path / "features.json").write_text("{}")
    with pytest.raises(DataError, match=r"pip install 'omnifusion-jax\[tfds\]'"):
        open_source(str(tmp_path), "", 6)


@pytest.fixture
def source(tmp_path):
    """A JSON file with every form of dialogue."""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    text = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    parts = [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "What?\n"}]
    records = [
        {"id": "a", "image": "1.png", "conversations": llava(1)["conversations"]},
        {"id": "b\ud83d", "messages": text},
        {"images": ["2.png", "0.png"], "messages": text},
        {"images": ["2.png"], "messages": [{"role": "user", "content": parts}, text[1]]},
    ]
    (tmp_path / "d.json").write_text(json.dumps(records))
    return JsonSource(tmp_path / "d.json", tmp_path)


def test_there_and_back(source, tmp_path):
    steps = []
    plan = planned(source, "d", shard_records=3)
    done = write_tfds(source, tmp_path / "out", plan, "my_talks", skip=False, advance=steps.append)
    folder = tmp_path / "out" / "my_talks" / "1.0.0"
    assert sum(steps) == 4 and done["records"] == 4 and done["media"] == {"image": 4}
    assert done["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]

    builder = tfds.builder_from_directory(str(folder))  # by TFDS itself, which decodes the pictures
    assert builder.info.splits["train"].shard_lengths == [3, 1]
    first, second, *_ = builder.as_data_source("train")
    said = [text.decode() for text in first["conversations"]["value"]]
    assert said == ["<image>\nЧто это? 1", "A cat."]
    np.testing.assert_array_equal(first["images"], np.full((1, 9, 8, 3), 10, np.uint8))
    assert [text.decode() for text in second["messages"]["role"]] == ["user", "assistant"]

    again = open_source(str(folder), "", 6)
    for i in range(4):
        before, after = source[i], again[i]
        assert after.turns == before.turns
        assert (after.marked, after.parted) == (before.marked, before.parted)
        assert list(after.images) == [file.read_bytes() for file in before.images]
    assert "d.json[0]" in again[0].where
    assert "tensorflow" not in sys.modules


def test_what_cannot_be_written(source, tmp_path):
    plan = planned(source, "d")
    (tmp_path / "0.png").write_bytes(b"hello")
    write = lambda name="talks", skip=False: write_tfds(source, tmp_path / "out", plan, name, skip=skip)
    with pytest.raises(DataError, match=r"d\.json\[2\].*on_bad_sample=skip"):
        write()
    assert not (tmp_path / "out" / "talks" / "1.0.0").exists()
    assert write(skip=True)["skipped"] == {"not_a_picture": 1}
    assert len(TfdsSource(str(tmp_path / "out" / "talks" / "1.0.0"))) == 3
    with pytest.raises(DataError, match="is there already"):
        write(skip=True)
    with pytest.raises(DataError, match="small letters, digits and _"):
        write("my talks")
    (tmp_path / "none.json").write_text(json.dumps([{"id": "a"}]))
    nothing = JsonSource(tmp_path / "none.json")
    with pytest.raises(
        DataError, match=r"none/1\.0\.0: no record can be used\. The first: .*id \"a\""
    ) as caught:
        write_tfds(nothing, tmp_path / "out", planned(nothing, "d"), "none", skip=True)
    assert caught.value.reason == "form" and not (tmp_path / "out" / "none" / "1.0.0").exists()
