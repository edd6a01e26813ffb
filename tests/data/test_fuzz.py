"""A thousand damaged samples: no crash, no hang, and each is left out for the right reason."""

import base64
import collections
import io
import json
import random
import struct
import time
import zlib

import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.data.dialogues import from_record
from omnifusion_jax.data.layout import Prepare
from omnifusion_jax.data.pipeline import Batches, Read
from omnifusion_jax.data.readers import BadSample
from omnifusion_jax.data.sources import JsonSource
from omnifusion_jax.errors import DataError

COUNT = 1000
TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def encoded(form, **settings):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form, **settings)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(extra, size=(30, 40)):
    """A PNG file whose header says `size`, with more chunks after it."""
    plain = encoded("PNG")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0))
    return plain[:8] + header + extra + plain[33:]


BOMB = png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 100_000_000, 1)))


class Damage:
    """The kinds of damage: each writes what it needs to `folder` and gives (line of the file, reasons)."""

    def __init__(self, folder):
        self.folder, self.random, self.number = folder, random.Random(0), 0
        self.files = [("jpg", encoded("JPEG")), ("png", encoded("PNG")), ("webp", encoded("WEBP"))]
        (folder / "inside").mkdir()
        (folder.parent / "secret.jpg").write_bytes(encoded("JPEG"))

    def line(self, image=None, **more):
        record = {"id": str(self.number), "image": image, "conversations": TALK} | more
        return json.dumps({name: value for name, value in record.items() if value is not None}).encode()

    def stored(self, data, end="jpg"):
        name = f"{self.number}.{end}"
        (self.folder / name).write_bytes(data)
        return name

    def truncated(self):
        end, data = self.random.choice(self.files)
        return self.line(self.stored(data[: self.random.randrange(1, len(data) * 9 // 10)], end)), {
            "damaged",
            "not_a_picture",
        }

    def noise(self):
        return self.line(self.stored(self.random.randbytes(500))), {"not_a_picture", "damaged"}

    def text_for_a_picture(self):
        return self.line(self.stored(b"<html>404 not found</html>")), {"not_a_picture"}

    def empty_file(self):
        return self.line(self.stored(b"")), {"file_size"}

    def missing(self):
        return self.line(f"gone/{self.number}.jpg"), {"missing"}

    def a_folder(self):
        return self.line("inside"), {"missing"}

    def huge_header(self):
        return self.line(self.stored(png_with(b"", (self.random.randrange(8000, 60000),) * 2), "png")), {
            "size"
        }

    def empty_header(self):
        return self.line(self.stored(png_with(b"", (0, 40)), "png")), {"damaged", "size", "not_a_picture"}

    def text_bomb(self):
        """100 MB of text in a kilobyte."""
        return self.line(self.stored(BOMB, "png")), {"damaged"}

    def animation(self):
        file = io.BytesIO()
        frames = [Image.fromarray(PIXELS // n) for n in (1, 2, 3)]
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
        return self.line(self.stored(file.getvalue(), "gif")), {"animated"}

    def bad_base64(self):
        return self.line("data:image/png;base64,####"), {"data_url"}

    def cut_data_url(self):
        data = base64.b64encode(self.files[1][1])[: 4 * self.random.randrange(10, 300)].decode()
        return self.line(f"data:image/png;base64,{data}"), {"damaged"}

    def address(self):
        return self.line(f"https://example.org/{self.number}.jpg"), {"not_fetched"}

    def traversal(self):
        name = self.random.choice(["../secret.jpg", "../" * 9 + "etc/passwd", "inside/../../secret.jpg"])
        return self.line(name), {"outside"}

    def absolute(self):
        return self.line(self.random.choice(["/etc/passwd", str(self.folder.parent / "secret.jpg")])), {
            "outside"
        }

    def link(self):
        name = f"{self.number}.jpg"
        (self.folder / name).symlink_to(self.folder.parent / "secret.jpg")
        return self.line(name), {"outside"}

    def circle_of_links(self):
        name = f"{self.number}.jpg"
        (self.folder / name).symlink_to(self.folder / name)
        return self.line(name), {"missing"}

    def nul_in_a_name(self):
        return self.line("a\0.jpg"), {"missing"}

    def nul_bytes(self):
        return self.line("a.jpg").replace(b"What", b"Wh\0t"), {"not_json"}

    def not_utf8(self):
        return self.line("a.jpg").replace(b"What", b"Wh\xff\xfet"), {"not_utf8"}

    def nested(self):
        return b'{"conversations": ' + b"[" * self.random.randrange(2000, 50_000) + b"}", {"not_json"}

    def cut_line(self):
        line = self.line("a.jpg")
        return line[: self.random.randrange(1, len(line))], {"not_json"}

    def huge_number(self):
        return b'{"id": ' + b"9" * 10_000 + b', "conversations": []}', {"not_json"}

    def not_a_record(self):
        return self.random.choice([b"[]", b"3", b'"text"', b"null", b"{}"]), {"form"}

    def half_a_character(self):
        return self.line("a.jpg").replace(b"What", b"\\ud83d"), {"characters"}

    def wrong_types(self):
        value = self.random.choice([5, {"a": 1}, [[]], [5], True])
        return self.line(value), {"media", "marks"}

    def marks(self):
        return self.line(["good.jpg", "good.jpg"]), {"marks"}

    def speaker(self):
        return self.line("good.jpg", conversations=[{"from": "nobody", "value": "<image>hi"}]), {"speaker"}

    def empty_turn(self):
        turns = [TALK[0], {"from": "gpt", "value": " \n"}]
        return self.line("good.jpg", conversations=turns), {"empty_turn"}

    def no_answer(self):
        return self.line("good.jpg", conversations=TALK[:1]), {"no_answer"}

    def answer_first(self):
        return self.line("good.jpg", conversations=TALK[::-1]), {"order"}

    def long(self):
        turns = [TALK[0], {"from": "gpt", "value": "red " * 500}]
        return self.line("good.jpg", conversations=turns), {"too_long"}


KINDS = [
    name
    for name, value in vars(Damage).items()
    if callable(value) and name not in ("__init__", "line", "stored")
]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The source of COUNT damaged records and as many good ones, and the expected reasons by index."""
    folder = tmp_path_factory.mktemp("fuzz") / "pictures"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(encoded("JPEG"))
    (folder / "png named.jpg").write_bytes(encoded("PNG"))  # a wrong name is no damage
    damage, lines, expected = Damage(folder), [], {}
    for number in range(COUNT):
        damage.number = number
        line, reasons = getattr(damage, KINDS[number % len(KINDS)])()
        expected[len(lines)] = (KINDS[number % len(KINDS)], reasons)
        lines += [line, damage.line(("good.jpg", "png named.jpg")[number % 2])]
    path = folder.parent / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    tokenizer = tiny.make_tokenizer(folder.parent / "tokenizer")
    return JsonSource(path, folder), Prepare.of(tokenizer, tiny.config(), 96), expected


def test_each_is_left_out_for_its_reason(damaged):
    source, prepare, expected = damaged
    read, wrong = Read(source, prepare), []
    for i in range(len(source)):
        start = time.perf_counter()
        found = read(i)
        if time.perf_counter() - start > 5:
            wrong.append((i, expected[i], "slow"))
        reason = found.reason if isinstance(found, BadSample) else "good"
        kind, reasons = expected.get(i, ("good", {"good"}))
        if reason not in reasons:
            wrong.append((i, kind, reason))
        elif isinstance(found, BadSample):
            assert f"d.jsonl:{i + 1}" in found.problem
    assert wrong == []
    assert len(KINDS) > 30 and len(expected) == COUNT


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_bit_flips_change_pictures_or_are_told(damaged):
    """Whatever bits are flipped, a sample comes out, or a reason."""
    source, prepare, _ = damaged
    rng, found = random.Random(1), collections.Counter()
    for number in range(300):
        data = bytearray(
            rng.choice([encoded("JPEG"), encoded("PNG"), encoded("WEBP"), encoded("GIF"), encoded("TIFF")])
        )
        for _ in range(rng.randrange(1, 20)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (source.images / "flipped").write_bytes(data)
        made = Read([prepare_record(source, number)], prepare)(0)
        found[made.reason if isinstance(made, BadSample) else "good"] += 1
    assert set(found) <= {"good", "damaged", "not_a_picture", "size", "animated", "levels", "file_size"}
    assert found["good"] > 20 and found["damaged"] > 20


def prepare_record(source, number):
    return from_record({"image": "flipped", "conversations": TALK}, f"flipped {number}", source.images)


def test_a_run_counts_them_all_and_its_batches_hold_none(damaged):
    source, prepare, expected = damaged
    settings = {
        "batch_size": 39,
        "length": 96,
        "tiles": prepare.tiles,
        "on_bad_sample": "skip",
        "bad_share": 1.0,
    }

    def counted(workers):
        batches = Batches(source, prepare, num_workers=workers, shuffle=False, **settings)
        looked = [0]
        while 39 * min(looked) < len(source):
            batch = next(batches)
            looked = [looked for looked, *_ in batches.state()["rows"].values()]
            assert (batch.segments.sum(axis=1) > 0).all() and (batch.items == 1).all()
        state = batches.state()
        batches.close()
        return state

    state = counted(0)
    assert sorted(state["bad"]) == sorted(expected)
    assert counted(2) == state


def test_a_row_that_finds_nothing_but_damage_ends_the_run(damaged):
    """Every second record is damaged: in their own order, all that an even row of 40 takes."""
    source, prepare, _ = damaged
    settings = {"length": 96, "tiles": prepare.tiles, "on_bad_sample": "skip", "bad_share": 1.0}
    with pytest.raises(DataError, match="row 0 of the batches finds nothing but bad records"):
        next(Batches(source, prepare, batch_size=40, shuffle=False, **settings))
