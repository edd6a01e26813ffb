"""Whatever is wrong with data or settings, the message says what, where and what to do.

Bad samples are skipped on demand, and counted.
"""

import functools
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.config import TrainConfig, from_dict
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.data.sources import open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError, DataError

SIZE, LENGTH = 48, 96


# --- pictures: functions that write a file


def picture(path, **options):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path, **options)


def truncated(path):
    picture(path)
    path.write_bytes(path.read_bytes()[:-400])


def gigantic(path, side=20000):
    """A valid picture of side x side black pixels: 400 million in some 50 kB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = b"".join(packer.compress(row * 1000) for _ in range(side // 1000)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    assert path.stat().st_size < 200_000


def animated(path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def text(path):
    path.write_text("I am not a picture.")


def nothing(path):
    pass


# --- records


def talk(*turns):
    return {"conversations": [{"from": role, "value": value} for role, value in turns]}


GOOD = {"id": "good", "image": "good.png", **talk(("human", "<image>\nWhat?"), ("gpt", "red circle top"))}


def with_picture(name):
    return {**GOOD, "id": "bad", "image": name}


def without_picture(*turns):
    return {"id": "bad", **talk(*turns)}


HUMAN, ANSWER = ("human", "What?"), ("gpt", "cat")
MARKS = "Add the missing file or remove a mark"
BAD = {  # what is wrong -> (record, how its picture is written, what the message says)
    "missing image": (with_picture("gone.jpg"), nothing, ["gone.jpg: there is no such file. Check the name"]),
    "truncated image": (with_picture("cut.jpg"), truncated, ["cut.jpg: truncated, damaged", "Copy it again"]),
    "gigantic image": (
        with_picture("big.png"),
        gigantic,
        ["big.png: has more pixels than Pillow opens. Scale it down"],
    ),
    "large image": (
        with_picture("big.png"),
        functools.partial(gigantic, side=8000),
        [
            (
                "big.png: 8000 x 8000 pixels; 1 to 50,000,000 (max_pixels) are allowed. "
                "Scale it, or change the limit"
            )
        ],
    ),
    "animated image": (
        with_picture("anim.gif"),
        animated,
        ["anim.gif: an animation or a document of 3 frames", "Save the frame you mean"],
    ),
    "mislabelled file": (
        with_picture("notes.jpg"),
        text,
        ["notes.jpg: not an image in a known format", "Convert it"],
    ),
    "empty file": (with_picture("empty.png"), Path.touch, ["empty.png: a file of 0 bytes", "copy it again"]),
    "folder": (with_picture("folder"), Path.mkdir, ["folder: a folder or device. Give a picture file"]),
    "mark without image": (
        without_picture(("human", "<image>\nWhat?"), ANSWER),
        nothing,
        ["1 <image> mark ", "lists 0 files", MARKS],
    ),
    "image without mark": (
        {**without_picture(HUMAN, ANSWER), "image": "good.png"},
        nothing,
        ["0 <image> marks", "lists 1 file.", MARKS],
    ),
    "two images, one mark": (
        {**GOOD, "id": "bad", "image": ["good.png"] * 2},
        nothing,
        ["1 <image> mark but", "lists 2 files", MARKS],
    ),
    "image is a number": (
        {**GOOD, "id": "bad", "image": 5},
        nothing,
        ['"image" must name a file or a list of files'],
    ),
    "empty turn": (
        without_picture(HUMAN, ("gpt", " ")),
        nothing,
        ["turn 1 is empty. Remove the turn or write its text"],
    ),
    "assistant first": (
        without_picture(ANSWER, HUMAN),
        nothing,
        ["starts with the assistant. The first turn must be the user's"],
    ),
    "no answer": (
        without_picture(HUMAN),
        nothing,
        ["no turn of the assistant", "Add an answer or remove the dialogue"],
    ),
    "unknown role": (
        without_picture(("bard", "Hi"), HUMAN, ANSWER),
        nothing,
        ["turn 0 is from 'bard'; known are human, user, gpt, assistant"],
    ),
    "a system turn": (
        without_picture(("system", "Hi"), HUMAN, ANSWER),
        nothing,
        ["turn 0 is from 'system'", "belongs in model.prompt"],
    ),
    "too long": (
        without_picture(("human", "cat " * 200), ANSWER),
        nothing,
        ["tokens, but max_length is 96", "Shorten or split", "data.max_length"],
    ),
    "text that is no string": (
        without_picture(("human", 5), ANSWER),
        nothing,
        ["conversations[0] is not an object with the strings 'from' and 'value'"],
    ),
    "half a character": (
        without_picture(("human", "\ud83d"), ANSWER),
        nothing,
        ["conversations[0] holds half a character", "Correct its text"],
    ),
    "no turns": (
        {"id": "bad", "conversations": []},
        nothing,
        ["conversations is not a list of turns, or is empty"],
    ),
    "neither form": (
        {"id": "bad", "text": "hi"},
        nothing,
        ["neither 'conversations' (LLaVA) nor 'messages'"],
    ),
}


@pytest.fixture(scope="module")
def prepare():
    return tiny.prepare(Tokenizer(locate("omnifusion-tiny-decoder")), LENGTH)


def batches(prepare, path, on_bad_sample="raise"):
    source = open_source(str(path), str(path.parent), 6)
    return Batches(
        source,
        prepare,
        batch_size=3,
        length=LENGTH,
        tiles=prepare.tiles,
        shuffle=False,
        on_bad_sample=on_bad_sample,
    )


def second_line_is(folder, line):
    """A data set of four dialogues, the second of them `line`."""
    picture(folder / "good.png")
    good, path = json.dumps(GOOD), folder / "dialogues.jsonl"
    path.write_text("\n".join([good, line, good, good]))
    return path


def check(prepare, path, words):
    with pytest.raises(DataError) as caught:
        next(batches(prepare, path))
    message = str(caught.value)
    assert all(
        word in message
        for word in [*words, "(data.on_bad_sample=skip leaves such samples out and counts them)"]
    ), message
    assert ".." not in message.replace(str(path.parent), "")
    skipping = batches(prepare, path, "skip")
    batch = next(skipping)
    assert (batch.weights.sum(axis=1) > 0).all() and batch.media["image"][0].reshape(3, -1).any(
        axis=1
    ).all()  # three good ones
    assert skipping.state()["bad"] == [1] and all(word in skipping.left_out()[0] for word in words)


@pytest.mark.parametrize("case", BAD)
def test_bad_dialogues(prepare, tmp_path, case):
    record, write, words = BAD[case]
    if write is not nothing:
        write(tmp_path / record["image"])
    path = second_line_is(tmp_path, json.dumps(record))
    check(prepare, path, [f'{path}:2 (id "bad"): ', *words])


def test_a_line_that_is_not_json(prepare, tmp_path):
    path = second_line_is(tmp_path, '{"id": "bad", "image": "go')
    check(prepare, path, [f"{path}:2: not JSON (", "Correct or remove the line"])


def test_too_many_bad_dialogues_stop_even_a_run_that_skips(prepare, tmp_path):
    path = second_line_is(tmp_path, json.dumps(with_picture("gone.jpg")))
    path.write_text("\n".join([path.read_text()] * 2))
    run = batches(prepare, path, "skip")
    next(run)
    message = r"2 of \d records are bad; of all 8 no more than 1 may be \(data.bad_share=0.01\)"
    with pytest.raises(DataError, match=message) as caught:
        next(run)
    assert f"{path}:2" in str(caught.value) and f"{path}:6" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"id": "a"}', ["a list of dialogues is expected, this is a dict. Put it in [ ]"]),
        ('[{"id": "a",\n]', [":2: not JSON", "must be named .jsonl"]),
        ("", ["holds no dialogues"]),
        (None, ["does not exist: data.path names a LLaVA JSON or JSONL file"]),
    ],
)
def test_bad_files(prepare, tmp_path, content, words):
    path = tmp_path / "dialogues.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as caught:
        batches(prepare, path)
    assert str(caught.value).startswith(str(path)) and all(word in str(caught.value) for word in words)


def test_a_folder_or_a_url_as_a_data_set(tmp_path):
    def refused(path, words):
        with pytest.raises(DataError) as caught:
            open_source(str(path), "", 6)
        assert str(caught.value) == words

    refused(tmp_path, f"{tmp_path} is a folder: give the file in it, e.g. {tmp_path}/dialogues.json")
    for name in ("readme.txt", "b.json", "a.jsonl"):
        (tmp_path / name).touch()
    refused(tmp_path, f"{tmp_path} is a folder: give the file in it, e.g. {tmp_path}/a.jsonl")
    refused(
        "https://x.org/a.json",
        "data.path=https://x.org/a.json is not fetched: download it, and give the path of the file",
    )


# --- settings


@pytest.mark.parametrize(
    ("values", "section"),
    [({"nonsense": 1}, "TrainConfig"), ({"data": {"path": "x", "nonsense": 1}}, "DataConfig")],
)
def test_an_unknown_field_of_a_config(values, section):
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, values)
    assert f"{section} has no field nonsense; it has " in str(caught.value)
