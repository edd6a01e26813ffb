"""LLaVA JSON, JSONL and messages become dialogues; what is wrong with a file or line is said where it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.data import questions, synthetic
from omnifusion_jax.data.describe import describe
from omnifusion_jax.data.dialogues import Dialogue, Media, Request, from_request, located, parse
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.data.sources import SYNTHETIC, JsonSource, SyntheticSource, open_source
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared/data"
REAL = SHARED / "real_dialogues"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no dialogues in {REAL}")

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat"}]
TURNS = (("human", "<image>\nWhat?"), ("gpt", "A cat"))


def record(**fields):
    return {"id": "a", "image": "cat.jpg", "conversations": TALK, **fields}


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(*records):
    return "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)


def refused(call, *words):
    with pytest.raises(DataError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- what a record may look like


@pytest.mark.parametrize(
    ("image", "files"),
    [
        ("cat.jpg", ("cat.jpg",)),
        (["cat.jpg"], ("cat.jpg",)),
        (["a.png", "b.png"], ("a.png", "b.png")),
        (None, ()),
        ([], ()),
        ("sub/ё.jpg", ("sub/ё.jpg",)),
    ],
)
def test_image_is_a_name_or_a_list_of_names_or_null(tmp_path, image, files):
    dialogue = JsonSource(written(tmp_path / "d.json", [record(image=image)]), "pics")[0]
    assert dialogue.images == tuple(Path("pics", name) for name in files)
    assert (dialogue.turns, dialogue.marked) == (TURNS, True)
    assert dialogue.where == f'{tmp_path / "d.json"}[0] (id "a")'


def test_without_an_image_or_an_id(tmp_path):
    source = JsonSource(
        written(tmp_path / "d.json", [{"conversations": TALK}, {"id": 0, "conversations": TALK}])
    )
    assert source[0].images == () and source[0].where == f"{tmp_path / 'd.json'}[0]"
    assert source[1].where == f'{tmp_path / "d.json"}[1] (id "0")'
    for i in (-1, 2):
        with pytest.raises(IndexError):
            source[i]


def test_keys_that_nothing_reads_are_told():
    """Those that hold nothing are not: tables have every field in every row."""
    more = {"source": "web", "Images": ["b.jpg"], "pictures": [], "image_0": None}
    assert parse(record(**more), "here").unread == ("source", "Images")  # it has its picture
    turns = [{"role": "user", "content": "x", "name": "y", "images": []}] * 2
    assert parse({"messages": turns, "Images": ""}, "here").unread == ("messages[].name",)
    pair = {"question": "x", "chosen": "a", "rejected": "b", "idx": 3, "image": "a.jpg"}
    assert parse(pair, "here").unread == ("idx",)
    assert parse({"instruction": "x", "input": "", "output": "y", "id": 1}, "here").unread == ()


def test_messages_and_images(tmp_path):
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat"}]
    path = written(
        tmp_path / "d.jsonl", lines({"id": 7, "image": None, "images": ["a.jpg"], "messages": messages})
    )
    dialogue = JsonSource(path, tmp_path)[0]
    assert dialogue.images == (tmp_path / "a.jpg",)
    assert (dialogue.turns, dialogue.marked) == ((("user", "What?"), ("assistant", "A cat")), False)
    assert dialogue.where == f'{path}:1 (id "7")'


def test_without_a_folder_names_stay_as_they_are(tmp_path):
    for name in ("/pictures/cat.jpg", "../cat.jpg", "cat.jpg"):
        assert JsonSource(written(tmp_path / "d.json", [record(image=name)]))[0].images == (Path(name),)


def test_nothing_outside_the_folder_of_pictures_is_read(tmp_path):
    (tmp_path / "pics/sub").mkdir(parents=True)
    (tmp_path / "pics/link.jpg").symlink_to("/etc/passwd")
    (tmp_path / "pics/other").symlink_to(tmp_path)
    (tmp_path / "pics-2").mkdir()
    inside = ["a.jpg", "sub/a.jpg", "sub/../a.jpg", str(tmp_path / "pics/a.jpg")]
    for name in inside:
        path = written(tmp_path / "d.json", [record(image=name)])
        assert JsonSource(path, tmp_path / "pics")[0].images == (tmp_path / "pics" / name,)
    outside = [
        "../a.jpg",
        "sub/../../a.jpg",
        "/etc/passwd",
        "link.jpg",
        "other/a.jpg",
        "../pics-2/a.jpg",
        ".",
    ]
    for name in outside:
        path = written(tmp_path / "d.json", [record(image=name)])
        with pytest.raises(DataError, match="lies outside the folder of pictures") as caught:
            JsonSource(path, tmp_path / "pics")[0]
        assert caught.value.reason == "outside" and str(caught.value).startswith(
            f'{path}[0] (id "a"): {name}'
        )
    path = written(tmp_path / "d.json", [record(image="a\0.jpg")])
    refused(lambda: JsonSource(path, tmp_path / "pics")[0], "there is no such file")


def test_what_hugging_face_data_sets_hold_for_a_picture(tmp_path):
    assert located({"bytes": b"x", "path": "a.jpg"}, "image", "pics") == b"x"
    assert located({"bytes": None, "path": "a.jpg"}, "image", "") == Path("a.jpg")
    assert located({"bytes": b"", "path": "a.jpg"}, "image", "") == b""  # an empty file, not another one
    assert located(b"x", "image", "pics") == b"x"


def test_a_request_takes_pictures_as_they_are():
    picture = np.zeros((4, 4, 3), np.uint8)
    dialogue = from_request(Request([{"role": "user", "content": "What?"}], images=[picture, "cat.jpg"]))
    assert dialogue.images[0] is picture and dialogue.images[1] == "cat.jpg"
    assert from_request(Request([{"role": "user", "content": "What?"}], images=picture)).images[0] is picture


def test_a_dialogue_is_asked_with_the_media_of_its_turns():
    media = tuple(
        Media(stream, source) for stream, source in (("image", "a"), ("sound", "s"), ("image", "b"))
    )
    dialogue, messages = Dialogue("here", TURNS, media), [{"role": "user", "content": "What?"}]
    assert dialogue.images == dialogue.of("image") == ("a", "b") and dialogue.of("sound") == ("s",)
    whole = dialogue.request(messages, "7")
    assert whole == Request(messages, ["a", "b"], "7", {"sound": ["s"]})
    assert dialogue.request(messages, items={"image": 1}) == Request(messages, ["a"], None, {"sound": []})
    assert Dialogue("here", TURNS).request(messages, items={}) == Request(messages)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("a string", ["a dialogue is an object with 'conversations' or 'messages', this is a str"]),
        (
            {"id": "a", "text": "x"},
            ['(id "a")', "neither 'conversations' (LLaVA) nor 'messages'", "id, text"],
        ),
        ({}, ["only nothing"]),
        (record(conversations=[]), ['(id "a")', "conversations is not a list of turns, or is empty"]),
        (record(conversations="What?"), ["conversations is not a list of turns"]),
        (
            record(conversations=[*TALK, {"from": "gpt", "value": 5}]),
            ["conversations[2]", "'from' and 'value'"],
        ),
        (record(conversations=[{"from": "human"}]), ["conversations[0]"]),
        (record(conversations=[["human", "What?"]]), ["conversations[0]"]),
        ({"messages": [{"role": None, "content": "x"}]}, ["messages[0]", "'role' and 'content'"]),
        (
            record(conversations=[{"from": "human", "value": "cut \ud83d"}]),
            ["conversations[0]", "half a character", "Correct its text"],
        ),
        (
            {"messages": [{"role": "user", "content": "cut \ud83d"}]},
            ["messages[0]", "half a character", "Correct its text"],
        ),
        (
            {"instruction": "Add.", "output": "cut \ud83d"},
            ["output holds half a character", "Correct its text"],
        ),
        ({"instruction": 1, "output": "red"}, ["instruction is no string"]),
        (
            {"id": "a", "imagee": "a.jpg", "messages": [{"role": "user", "content": "x"}]},
            ['(id "a")', 'nothing reads "imagee", and "image" beside the turns is not given', "rename it"],
        ),
        (
            {"messages": [{"role": "user", "content": "x", "images": ["a.jpg"]}]},
            ['nothing reads "messages[].images", and "images" beside the turns'],
        ),
        (record(image=5), ['(id "a")', '"image" must name a file or a list of files, not hold a int']),
        (record(image=["a.jpg", {"path": "b.jpg"}]), ["must name a file or a list of files"]),
    ],
)
def test_broken_records_are_named_when_their_turn_comes(tmp_path, broken, words):
    path = written(tmp_path / "d.json", [record(), broken])
    source = JsonSource(path)
    assert len(source) == 2 and source[0].turns == TURNS
    refused(lambda: source[1], f"{path}[1]", *words)


# --- files


def test_jsonl_counts_lines_and_skips_blank_ones(tmp_path):
    path = written(tmp_path / "d.jsonl", lines(record(id="a"), "", record(id="b"), "  "))
    assert [d.where for d in map(JsonSource(path).__getitem__, range(2))] == [
        f'{path}:1 (id "a")',
        f'{path}:3 (id "b")',
    ]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    talk = [{"from": "human", "value": "one\u2028two\x85three\u2029\x1e"}, {"from": "gpt", "value": "да"}]
    source = JsonSource(written(tmp_path / "d.jsonl", lines(record(conversations=talk), record())))
    assert len(source) == 2 and source[0].turns[0][1] == "one\u2028two\x85three\u2029\x1e"


def test_byte_order_marks_and_windows_line_ends(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(record(), record()).replace("\n", "\r\n").encode())
    assert [JsonSource(path)[i].turns for i in range(2)] == [TURNS, TURNS]


def test_a_broken_line_is_reported_when_its_turn_comes(tmp_path):
    path = written(tmp_path / "d.jsonl", lines(record(), '{"id": "b", "conv', record()))
    source = JsonSource(path)
    assert len(source) == 3 and source[0].turns == source[2].turns == TURNS
    refused(lambda: source[1], f"{path}:2: not JSON (", "Correct or remove the line")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.json", {"id": "a"}, ["a list of dialogues is expected, this is a dict", "Put it in [ ]"]),
        ("d.json", "null", ["a list of dialogues is expected"]),
        ("d.json", '[\n{"a": 1},\n{]', ["d.json:3: not JSON", "one object a line must be named .jsonl"]),
        ("d.json", lines(record(), record()), ["d.json:2: not JSON", "must be named .jsonl"]),
        ("d.json", "", ["holds no dialogues"]),
        ("d.json", "[]", ["holds no dialogues"]),
        ("d.jsonl", "\n \n", ["holds no dialogues"]),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, words):
    path = written(tmp_path / name, content)
    refused(lambda: JsonSource(path), str(path), *words)


def test_a_missing_file_and_another_encoding(tmp_path):
    refused(
        lambda: open_source(str(tmp_path / "no.json"), "", 6),
        f"{tmp_path / 'no.json'} does not exist",
        "data.path names",
    )
    for address in (URL, "https://example.org/d.json"):
        refused(lambda a=address: open_source(a, "", 6), f"data.path={address[:9]}", " is not fetched: downl")
    refused(lambda: JsonSource(tmp_path), "is a folder: give the file in it")
    (tmp_path / "d.json").write_bytes('[{"id": "ж"}]'.encode("cp1251"))
    source = JsonSource(tmp_path / "d.json")
    refused(lambda: source[0], "d.json[0]: not UTF-8 (byte 8)", "Save it as UTF-8")


URL = "data:image/png;base64,iVBORw0KGgo="


def said(*content, **more):
    return {"messages": [{"role": "user", "content": part} for part in content], **more}


def test_content_may_be_a_list_of_parts(tmp_path):
    shown = [
        {"type": "image_url", "image_url": {"url": "b.jpg"}},
        {"type": "text", "text": "And"},
        {"type": "text", "text": "this?"},
    ]
    first = [{"type": "text", "text": "What?"}, {"type": "image"}]
    path = written(tmp_path / "d.jsonl", lines(said(first, "Well?", shown, images=["a.jpg"])))
    dialogue = JsonSource(path, "pics")[0]
    assert dialogue.turns == (("user", "What?\n<image>"), ("user", "Well?"), ("user", "<image>\nAnd\nthis?"))
    assert (
        dialogue.media == (("image", Path("pics/a.jpg")), ("image", Path("pics/b.jpg")))
        and dialogue.parted
        and not dialogue.marked
    )
    alone = JsonSource(
        written(tmp_path / "e.jsonl", lines(said([{"type": "text", "text": "What?"}], images=["a.jpg"]))),
        "pics",
    )[0]
    assert (alone.turns, alone.images, alone.parted) == ((("user", "What?"),), (Path("pics/a.jpg"),), False)


@pytest.mark.parametrize(
    "address",
    [URL, "https://example.org/a.png", "HTTP://example.org/a.png", "s3://bucket/a.png", "file:///a.png"],
)
def test_an_address_is_not_a_name_in_the_folder(tmp_path, address):
    for form in (
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "image_url": address},
        {"type": "image", "url": address},
    ):
        path = written(tmp_path / "d.jsonl", lines(said([form, {"type": "text", "text": "What?"}])))
        assert JsonSource(path, "pics")[0].images == (address,)
    assert JsonSource(written(tmp_path / "d.jsonl", lines(said("What?", images=[address]))), "pics")[
        0
    ].images == (address,)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            [{"type": "input_audio"}],
            ["messages[0].content[0] is of type 'input_audio'; known are text, image_url, image"],
        ),
        (["What?"], ["messages[0].content[0] is of type None"]),
        ([{"type": "text"}], ["messages[0].content[0] has no string 'text'"]),
        ([{"type": "text", "text": "cut \ud83d"}], ["content[0] holds half a character"]),
        ([{"type": "image_url", "image_url": {}}], ["content[0] has no string 'url'"]),
        ([{"type": "image"}, {"type": "image"}], ['2 "image" parts name no file, and "images" lists 1']),
        (
            [{"type": "image_url", "image_url": "b.jpg"}],
            ['0 "image" parts name no file, and "images" lists 1'],
        ),
        (5, ["messages[0] is not an object with the strings 'role' and 'content', or a list of parts"]),
    ],
)
def test_parts_that_cannot_be_read(content, words):
    refused(lambda: parse(said(content, images=["a.jpg"]), "here"), "here: ", *words)


def test_a_record_may_be_parsed_alone():
    assert parse(record(image=["x"]), "here").images == ("x",)


# --- synthetic sources


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_synthetic_dialogues(kind):
    source = open_source(f"synthetic:{kind}", "", 6)
    lay = tiny.layout(Tokenizer(locate("omnifusion-tiny-decoder")), 96)
    in_words = kind in ("text", "held-out-text")
    assert isinstance(source, SyntheticSource) and len(source) == 2**30
    for i in range(50):
        dialogue = source[i]
        assert (dialogue.where, dialogue.turns) == (f"synthetic:{kind}[{i}]", source[i].turns)
        assert [role for role, _ in dialogue.turns] == ["user", "assistant"] * (len(dialogue.turns) // 2)
        assert len(dialogue.images) == (not in_words) and all(
            (a == b).all() for a, b in zip(dialogue.images, source[i].images, strict=True)
        )
        pictures = [tiny.picture(np.zeros((96, 96, 3), np.uint8)) for _ in dialogue.images]
        assert lay(dialogue, pictures).weights.sum() > 0  # fits the tiny configurations' 96 tokens
    assert len({tuple(source[i].turns) for i in range(50)}) > 30


def test_an_unknown_kind_of_synthetic_data():
    refused(
        lambda: open_source("synthetic:cats", "", 6),
        "no synthetic:cats",
        "choose from captions, questions, text, held-out, held-out-text",
    )


# --- real dialogues


@needs_real
def test_real_dialogues_lay_out_with_the_released_tokenizer():
    tokenizer = Tokenizer(SHARED / "omnifusion_1_1")
    lay = tiny.layout(tokenizer, 512)
    source = JsonSource(REAL / "dialogues.json", REAL / "images")
    assert len(source) == 24
    for i in range(24):
        dialogue = source[i]
        assert all(image.is_file() for image in dialogue.images)
        sample = lay(dialogue, [tiny.picture(np.zeros((96, 96, 3), np.uint8)) for _ in dialogue.images])
        answers = [text for role, text in dialogue.turns if role == "gpt"]
        ends = np.flatnonzero((sample.tokens == tokenizer.eos) & (sample.weights > 0))
        assert len(ends) == len(answers)
        assert tokenizer.decode(sample.tokens[sample.weights > 0]) == " ".join(answers)


@needs_real
def test_the_pipeline_reads_every_real_picture():
    tokenizer = Tokenizer(SHARED / "omnifusion_1_1")
    prepare = tiny.prepare(tokenizer, 512, 48, 8)
    source = JsonSource(REAL / "dialogues.json", REAL / "images")
    batches = Batches(source, prepare, batch_size=24, length=512, tiles=prepare.tiles)
    batch = next(batches)
    pictures = batch.media["image"][0]
    assert pictures.shape == (24, 1, 48, 48, 3) and batch.tokens.shape == (24, 512)
    seen = pictures.reshape(24, -1).any(axis=1)
    assert (
        seen.sum() == 22 and (batch.index.max(axis=1) == np.where(seen, 35, 1)).all()
    )  # two dialogues without a picture
    assert len({image.tobytes() for image in pictures[seen]}) == 17
    assert "<SOI> <36 image features> <EOI>" in describe(source, prepare, tokenizer)


def test_synthetic_dialogues_are_mixed_as_they_are_said_to_be():
    """Over many dialogues there are one to four questions each, and both languages.

    A fifth of "text" are captions, which are one turn about the whole.
    """
    talks = {
        kind: [SyntheticSource(kind, 6)[i].turns for i in range(400)]
        for kind in ("captions", "questions", "text", "held-out")
    }
    pairs = {kind: [len(turns) // 2 for turns in said] for kind, said in talks.items()}
    assert {*pairs["captions"]} == {*pairs["held-out"]} == {1} and {*pairs["questions"]} == {1, 2, 3, 4}
    opening = {turns[0][1] for turns in talks["captions"]}
    assert len(opening) == 2
    english = sum(turns[0][1].isascii() for turns in talks["captions"])
    assert 150 < english < 250
    captions = sum(turns[0][1].endswith(tuple(opening)) for turns in talks["text"])
    assert 50 < captions < 110  # 80, by three standard deviations


def test_held_out_questions_are_about_held_out_scenes():
    for i in range(5):
        scene, rng = synthetic.scene_and_rng(i, "held-out")
        question, answer = questions.questions(scene, rng, 1)[0]
        held_out, in_words = SyntheticSource("held-out", 6)[i], SyntheticSource("held-out-text", 6)[i]
        assert held_out.turns == (("user", question), ("assistant", answer))
        assert (held_out.images[0] == synthetic.render(scene, rng)).all()
        assert in_words.turns[0][1] == " ".join([*synthetic.patch_words(scene, 6), question])
        scene, rng = synthetic.scene_and_rng(i, "train")
        rng.integers(2)
        assert (SyntheticSource("captions", 6)[i].images[0] == synthetic.render(scene, rng)).all()


def test_instructions_without_a_picture(tmp_path):
    """As Alpaca has them."""
    records = [
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"instruction": "Say red.", "input": "", "output": "red"},
        {"instruction": "Say red.", "output": 3},
        {"instruction": "Say red.", "input": None, "output": "red"},
    ]
    source = JsonSource(written(tmp_path / "d.json", records))
    assert source[3].turns == source[1].turns
    assert source[0].turns == (("user", "Add.\n1 and 2"), ("assistant", "3"))
    assert source[1].turns == (("user", "Say red."), ("assistant", "red"))
    refused(lambda: source[2], "d.json[2]: output is no string")
