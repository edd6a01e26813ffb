"""Any source as files: the same dialogues, the same bytes however they were made, and clear ends."""

import base64
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ROOT, run_command
from in_turn import in_turn
from PIL import Image

from omnifusion_jax.data.dialogues import Dialogue, Media
from omnifusion_jax.data.images import open_image
from omnifusion_jax.data.prepared.disk import locked
from omnifusion_jax.data.prepared.folder import prepare_files
from omnifusion_jax.data.prepared.plan import planned, whole
from omnifusion_jax.data.prepared.tfds_files import write_tfds
from omnifusion_jax.data.sources import ArrayRecordSource, JsonSource, open_source
from omnifusion_jax.errors import DataError, OmniFusionError

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "real_dialogues"


def picture(i, kind):
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def records():
    """(record of a JSON file, the files of its pictures) in every form."""
    said = [{"from": "human", "value": "<image>\nЧто это?"}, {"from": "gpt", "value": "A cat."}]
    text = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
    url = "data:image/png;base64," + base64.b64encode(picture(9, "PNG")).decode()
    parts = [{"type": "image"}, {"type": "text", "text": "And this?"}]
    parts += [{"type": "image_url", "image_url": {"url": url}}]
    yield {"id": "a", "image": "0.jpg", "conversations": said}, ["0.jpg"]
    yield {"id": "b", "messages": text}, []
    yield {"messages": [{"role": "user", "content": parts}, text[1]], "images": ["1.png"]}, ["1.png", url]
    yield {"id": 4, "images": ["1.png", "0.jpg"], "messages": text}, ["1.png", "0.jpg"]
    yield {"image": url, "conversations": said}, [url]


FILES = {"0.jpg": picture(0, "JPEG"), "1.png": picture(1, "PNG")}


@pytest.fixture
def data(tmp_path):
    """A data file of ten records, and the folder of its pictures."""
    images = tmp_path / "images"
    images.mkdir()
    for name, file in FILES.items():
        (images / name).write_bytes(file)
    path = tmp_path / "d.json"
    path.write_text(json.dumps([record for record, _ in records()] * 2))
    return path, images


def prepare(data, output, *, workers=1, skip=False, advance=lambda records: None, **settings):
    path, images = data
    source = open_source(str(path), str(images), 6)
    plan = planned(source, str(path), str(images), **{"shard_records": 3, **settings})
    return prepare_files(source, output, plan, workers=workers, skip=skip, advance=advance)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_dialogues_come_back_with_their_files(data, tmp_path):
    steps = []
    done = prepare(data, tmp_path / "out", advance=steps.append)
    before, after = JsonSource(*data), open_source(str(tmp_path / "out"), "", 6)
    assert len(after) == 10 and sum(steps) == 10
    files = FILES | {files[0]: picture(9, "PNG") for _, files in records() if files and len(files[0]) > 9}
    for i, (_, names) in enumerate([*records()] * 2):
        found = after[i]
        assert found.images == tuple(files[name] for name in names)
        assert dataclasses.replace(found, media=()) == dataclasses.replace(before[i], media=())
    assert [shard["records"] for shard in done["shards"]] == [3, 3, 3, 1]
    assert done["media"] == {"image": 12} and done["records"] == 10 and done["skipped"] == {}
    assert done["bytes"] == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.array_record"))
    assert sorted(contents(tmp_path / "out")) == [
        "dataset.json",
        *(f"dialogues-0000{i}-of-00004.array_record" for i in range(4)),
    ]


def test_the_bytes_do_not_depend_on_the_workers(data, tmp_path):
    prepare(data, tmp_path / "1", workers=1)
    prepare(data, tmp_path / "3", workers=3)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    steps = []
    (tmp_path / "3" / "unfinished").mkdir()  # as if it had been killed just before its end
    prepare(data, tmp_path / "3", advance=steps.append)  # once more: nothing is left to do
    assert contents(tmp_path / "1") == contents(tmp_path / "3") and steps == [10]


def test_the_fingerprint_is_that_of_the_dialogues(data, tmp_path):
    path, images = data
    prints = [prepare(data, tmp_path / "a")["fingerprint"]]
    prints.append(prepare(data, tmp_path / "b", shard_records=7)["fingerprint"])
    path = path.rename(tmp_path / "moved.json")
    prints.append(prepare((path, images), tmp_path / "c")["fingerprint"])
    assert len(set(prints)) == 1
    listed = json.loads(path.read_text())
    path.write_text(json.dumps([listed[1], listed[0], *listed[2:]]))
    prints.append(prepare((path, images), tmp_path / "d")["fingerprint"])
    path.write_text(json.dumps(listed))
    (images / "0.jpg").write_bytes(picture(5, "JPEG"))
    prints.append(prepare((path, images), tmp_path / "e")["fingerprint"])
    assert len(set(prints)) == 3


def test_what_was_made_is_kept(data, tmp_path):
    path, images = data
    last = images / "last.png"
    listed = json.loads(path.read_text())
    listed[-1] = {"id": "z", "image": "last.png", "conversations": listed[0]["conversations"]}
    path.write_text(json.dumps(listed))
    with pytest.raises(DataError, match=r'd\.json\[9\] \(id "z"\): .*last.png.*on_bad_sample=skip') as error:
        prepare(data, tmp_path / "out")
    assert error.value.reason == "missing"
    with pytest.raises(DataError, match="is not complete"):
        open_source(str(tmp_path / "out"), "", 6)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.array_record")}
    assert len(kept) == 3
    assert not list((tmp_path / "out" / "unfinished").glob("*.array_record.[0-9]*"))  # of what was begun
    last.write_bytes(FILES["1.png"])
    lost = sorted(kept)[1]
    lost.unlink()
    del kept[lost]
    steps = []
    prepare(data, tmp_path / "out", advance=steps.append)
    assert sum(steps) == 10
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    prepare(data, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_that_was_damaged_meanwhile_is_made_again(data, tmp_path):
    images = data[1]
    (images / "1.png").rename(images / "kept.png")
    with pytest.raises(DataError):
        prepare(data, tmp_path / "out", shard_records=2)
    (images / "kept.png").rename(images / "1.png")
    [first] = (tmp_path / "out").glob("*.array_record")
    first.write_bytes(first.read_bytes()[:-1])
    (tmp_path / "out" / "unfinished" / f"{first.name}.999").write_bytes(b"was being written")
    prepare(data, tmp_path / "out", shard_records=2)
    prepare(data, tmp_path / "whole", shard_records=2)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("finished", [True, False])
def test_something_else_in_the_same_folder(data, tmp_path, finished):
    path, images = data
    if finished:
        prepare(data, tmp_path / "out")
    else:
        (images / "1.png").unlink()
        with pytest.raises(DataError):
            prepare(data, tmp_path / "out", shard_records=2)
    (images / "1.png").write_bytes(FILES["1.png"])
    with pytest.raises(DataError, match=r"was made from something else: shard_records [23], now 4"):
        prepare(data, tmp_path / "out", shard_records=4)
    path.write_text(path.read_text().replace("Hello", "Good day"))
    with pytest.raises(DataError, match=r"from something else: fingerprint '[0-9a-f]+', now '[0-9a-f]+'"):
        prepare(data, tmp_path / "out")


class Unknown:
    """A source that cannot tell whether it is the same."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return self.source[i]


def test_a_source_without_a_fingerprint_is_written_once(data, tmp_path):
    source = Unknown(JsonSource(*data))
    plan = planned(source, "mine", shard_records=5)
    write = lambda: prepare_files(source, tmp_path / "out", plan, workers=1, skip=False)
    assert write()["records"] == 10
    with pytest.raises(DataError, match="has no fingerprint"):
        write()


def test_a_start_that_made_nothing_binds_nobody(data, tmp_path):
    path, images = data
    with pytest.raises(DataError, match="there is no such file"):
        prepare((path, tmp_path), tmp_path / "out", shard_records=10)
    assert prepare((path, images), tmp_path / "out")["records"] == 10


def test_a_folder_with_something_in_it(data, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(DataError, match="is not empty"):
        prepare(data, tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine": b""}


def test_bad_records_are_left_out_and_listed(data, tmp_path):
    path, images = data
    (images / "1.png").write_bytes(b"hello")  # of records 2 and 3, 7 and 8
    listed = json.loads(path.read_text())
    listed[5] = {"id": "no turns"}
    path.write_text(json.dumps(listed))
    done = prepare(data, tmp_path / "out", skip=True)
    assert done["records"] == 5 and done["skipped"] == {"form": 1, "not_a_picture": 4}
    rows = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["index"], row["reason"]) for row in rows] == [
        (2, "not_a_picture"),
        (3, "not_a_picture"),
        (5, "form"),
        (7, "not_a_picture"),
        (8, "not_a_picture"),
    ]
    assert f"{path}[3]" in rows[1]["problem"] and "1.png" in rows[1]["problem"]
    found, source = ArrayRecordSource(tmp_path / "out"), JsonSource(*data)
    assert [found[i].turns for i in range(5)] == [source[i].turns for i in (0, 1, 4, 6, 9)]
    prepare(data, tmp_path / "three", skip=True, workers=3)
    assert contents(tmp_path / "out") == contents(tmp_path / "three")
    with pytest.raises(DataError, match="leaves records out"):
        prepare(data, tmp_path / "out")


def test_records_left_out_by_an_earlier_start_are_not_taken_silently(data, tmp_path):
    (data[1] / "1.png").write_bytes(b"hello")
    portions = []

    def advance(records):
        portions.append(records)
        if len(portions) == 3:
            raise OmniFusionError("enough")

    with pytest.raises(OmniFusionError, match="enough"):
        prepare(data, tmp_path / "out", skip=True, advance=advance)
    assert list((tmp_path / "out").glob("*.array_record"))
    with pytest.raises(DataError, match=r"d\.json\[2\].*on_bad_sample=skip"):
        prepare(data, tmp_path / "out")
    assert prepare(data, tmp_path / "out", skip=True)["records"] == 6


def test_no_record_that_can_be_used(data, tmp_path):
    data[0].write_text(json.dumps([{"id": "a"}, {"id": "b"}]))
    with pytest.raises(DataError, match=r'none of the 2 records can be used\. The first: .*id "a"'):
        prepare(data, tmp_path / "out", skip=True)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_synthetic_pictures_are_kept_to_the_pixel(tmp_path):
    with pytest.raises(DataError, match="synthetic:questions has no end: --count=N"):
        prepare(("synthetic:questions", ""), tmp_path / "out")
    prepare(("synthetic:questions", ""), tmp_path / "out", count=5)
    before, after = open_source("synthetic:questions", "", 6), open_source(str(tmp_path / "out"), "", 6)
    assert len(after) == 5
    for i in range(5):
        assert after[i].turns == before[i].turns and after[i].where == before[i].where
        np.testing.assert_array_equal(Image.open(io.BytesIO(after[i].images[0])), before[i].images[0])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK", "I;16"])
def test_pil_images_are_kept_as_they_are_shown(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    given = Image.fromarray(pixels)
    given = Image.fromarray(np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000) if mode == "I;16" else given
    given = given if given.mode == mode else given.convert(mode)
    turned = Image.Exif()
    turned[0x0112] = 6  # it lies on its side
    given.info["exif"] = turned.tobytes()
    shown = np.asarray(open_image(given))
    [media] = whole(tiny.dialogue((), given), 20).media
    assert media.source.startswith(b"\x89PNG") and shown.shape == (5, 4, 3)
    np.testing.assert_array_equal(open_image(media.source), shown)
    with pytest.raises(DataError, match=r"5 x 4 pixels; 1 to 19 \(max_pixels\)"):
        whole(tiny.dialogue((), given), 19)


def test_headers_are_looked_at():
    for source, reason in ((FILES["0.jpg"], "size"), (FILES["1.png"][:20], "damaged"), (b"", "file_size")):
        with pytest.raises(DataError, match=r"^here: the given image: ") as error:
            whole(tiny.dialogue((), source), 100)
        assert error.value.reason == reason


def test_other_media_than_pictures(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"sound")
    hear = lambda source: whole(Dialogue("here", (), (Media("sound", source),)), 1).media[0].source
    assert hear(tmp_path / "a.wav") == hear(b"sound") == b"sound"
    with pytest.raises(DataError, match=r"here: .*b\.wav: No such file") as error:
        hear(tmp_path / "b.wav")
    assert error.value.reason == "missing"
    with pytest.raises(DataError, match='here: "sound" is a list: name its file'):
        hear([1, 2])


def test_how_many_records_a_shard_has(data):
    source = JsonSource(*data)
    plan = lambda **settings: planned(source, "d", **settings)
    assert plan().shard_records == 10 and len(plan()) == 1
    sizes = [len(file) for record in range(10) for file in whole(source[record], 1 << 20).images]
    few = plan(shard_bytes=3 * sum(sizes) // 10).shard_records
    assert few in (2, 3)  # what is around the pictures counts too
    assert plan(shard_bytes=1).shard_records == 1
    assert plan(count=4).records == 4 and plan(count=10).records == 10
    assert plan(shard_records=7).shard_records == 7 and plan(shard_records=70).shard_records == 10
    with pytest.raises(DataError, match="--count=11: d has 10 records"):
        plan(count=11)
    many = planned(open_source("synthetic:captions", "", 6), "s", count=6400)
    assert len(many) == 16  # so that there is work for several processes, though they are small
    assert [many.range(15), many.range(1)] == [range(6000, 6400), range(400, 800)]
    more = planned(open_source("synthetic:captions", "", 6), "s", count=6401)
    assert (more.shard_records, len(more), more.range(15)) == (401, 16, range(6015, 6401))


def test_two_processes_and_one_folder(data, tmp_path):
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(OmniFusionError, match="being written by another process"):
        prepare(data, tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


COMMAND = ("--data=synthetic:captions", "--count=400", "--shard_records=25")


def command(output, *arguments, before=""):
    """Starts the command line in a process."""
    line = [sys.executable, "-m", "omnifusion_jax.prepare_data", *COMMAND, f"--output={output}", *arguments]
    if before:
        line = ["bash", "-c", f'{before}; exec "$@"', "-", *line]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, cwd=ROOT, env=environment, **streams)


def test_what_was_cut_off_goes_on(tmp_path):
    said = run_command("prepare_data", *COMMAND, f"--output={tmp_path / 'whole'}", "--num_workers=3")
    assert f"{tmp_path / 'whole'}: 400 records, 400 image files, " in said
    output = tmp_path / "out"
    for number, (how, status) in enumerate([(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 0)]):
        process = command(output, "--num_workers=1")
        until = time.monotonic() + 60
        while len(list(output.glob("*.array_record"))) < 3 * number + 3:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        process.send_signal(how)
        printed, _ = process.communicate(timeout=30)
        assert process.returncode == status, printed
        kept = list(output.glob("*.array_record"))
        assert 3 * number + 3 <= len(kept) < 16 and not (output / "dataset.json").exists()
        if how != signal.SIGKILL:
            assert f"{output} keeps {len(kept)} complete files. The same command goes on: " in printed
            assert "Traceback" not in printed
    run_command("prepare_data", *COMMAND, f"--output={output}", "--num_workers=3")
    assert contents(output) == contents(tmp_path / "whole")


# Runs command lines one after the other in one process, since importing takes seconds
PICTURED = ["--data=d.json", "--images=images", "--num_workers=1"]
COMMANDS = {
    # the pictures have 600, 630 and 870 pixels
    "some": [*PICTURED, "--max_pixels=600", "--on_bad_sample=skip", "--count=9", "--shard_records=4"],
    "strict": [*PICTURED, "--max_pixels=600", "--shard_records=2"],
    "mega": ["--data=synthetic:captions", "--count=70", "--shard_mb=1", "--num_workers=1"],
    "words": ["--data=synthetic:text", "--count=1", "--side=3", "--to=tfds"],
    "usual": ["--data=synthetic:text", "--count=1", "--to=tfds"],
    "tfds": [*PICTURED, "--to=tfds", "--name=talks", "--count=2", "--max_pixels=629", "--shard_records=1"],
    "none": ["--data=d.json", "--images=images", "--num_workers=0"],
    "nothing": ["--images=images"],
}


@pytest.fixture
def ran(data, tmp_path):
    """{name: (status, what was printed)}; each command has written a folder of its name, in `tmp_path`."""
    lines = {name: [*words, f"--output={name}"] for name, words in COMMANDS.items()}
    found = in_turn("prepare_data", lines, tmp_path)
    return {name: (status, out + err) for name, (status, out, err) in found.items()}


def test_flags_say_what_is_written(ran, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    shards = lambda name: len(list((tmp_path / name).glob("*.array_record*")))
    statuses = {name: status for name, (status, _) in ran.items()}
    assert statuses == dict.fromkeys(COMMANDS, 0) | {"strict": 1, "none": 1, "nothing": 1}, ran
    said = {name: printed for name, (_, printed) in ran.items()}
    assert "some: 4 records, 2 image files, " in said["some"] and "  5 left out: size\n" in said["some"]
    assert "9/9 records" in said["some"] and shards("some") == 3
    assert "error: d.json[2]: " in said["strict"] and "--on_bad_sample=skip leaves" in said["strict"]
    assert shards("strict") == 1  # what is complete is kept
    assert 1 << 19 < max(file.stat().st_size for file in (tmp_path / "mega").glob("*.array_record")) < 1 << 21
    assert shards("mega") == 2
    for name, side in (("words", 3), ("usual", 6)):
        written = open_source(str(tmp_path / name / "dialogues/1.0.0"), "", 0)[0]
        assert written.turns == open_source("synthetic:text", "", side)[0].turns
    assert "tfds/talks/1.0.0: 2 records, 1 image files, " in said["tfds"] and shards("tfds/talks/1.0.0") == 2
    assert len(open_source(str(tmp_path / "tfds/talks/1.0.0"), "", 0)) == 2
    assert "num_workers" in said["none"] and "--data is missing" in said["nothing"]


def test_a_full_disk(tmp_path):
    output = tmp_path / "out"
    process = command(output, "--num_workers=1", before="ulimit -f 100")  # kilobytes a file
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in printed
    assert "cannot be written: " in printed and "File too large" in printed and "make room" in printed
    assert not list(output.glob("*.array_record")) and not (output / "dataset.json").exists()
    with pytest.raises(DataError, match="is not complete"):
        open_source(str(output), "", 6)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not here")
@pytest.mark.parametrize("kind", ["array_record", "tfds"])
def test_real_dialogues_give_the_same_samples(tmp_path, kind):
    before = open_source(str(REAL / "dialogues.json"), str(REAL / "images"), 6)
    plan = planned(before, "real", shard_records=10)
    if kind == "tfds":
        pytest.importorskip("tensorflow_datasets")
        write_tfds(before, tmp_path, plan, "real", skip=False)
    else:
        prepare_files(before, tmp_path / "real", plan, workers=1, skip=False)
    after = open_source(str(tmp_path / "real" / ("1.0.0" if kind == "tfds" else "")), "", 6)
    prepare = tiny.prepare(tiny.make_tokenizer(tmp_path / "tokenizer"), 2048)
    assert len(before) == len(after) == 24
    for i in range(24):
        same_samples(prepare(before[i]), prepare(after[i]))


def same_samples(a, b):
    """Everything in two Samples, arrays to the bit."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif dataclasses.is_dataclass(a):
        same_samples(vars(a), vars(b))
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        same_samples(list(a.values()), list(b.values()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            same_samples(one, other)
    else:
        assert a == b
