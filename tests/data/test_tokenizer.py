"""What is read from a tokenizer's directory, against ids that are known."""

import json

import pytest
import tiny

from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("made"))  # unk, bos, eos = 0, 1, 2


@pytest.fixture
def opened(made, tmp_path):
    """Opens a copy whose tokenizer_config.json says `names`, and whose tokenizer.json is edited."""

    def open(names, edit=lambda backend: None):
        backend = json.loads((made.directory / "tokenizer.json").read_text(encoding="utf-8"))
        edit(backend)
        (tmp_path / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
        return Tokenizer(tmp_path)

    return open


@pytest.mark.parametrize(
    ("names", "unk", "eos", "pad"),
    [
        ({}, 0, 2, 0),
        ({"unk_token": None, "eos_token": None}, 0, 2, 0),
        ({"pad_token": "<s>"}, 0, 2, 0),  # the unknown token goes before
        ({"eos_token": {"content": "<s>"}, "unk_token": {"content": "</s>"}}, 2, 1, 2),
    ],
)
def test_special_tokens(opened, names, unk, eos, pad):
    found = opened(names)
    assert (found.unk, found.eos, found.pad) == (unk, eos, pad)
    assert found.ends == {"bos_token_id": 1, "eos_token_id": eos}


def test_a_tokenizer_without_a_beginning(opened):
    found = opened({"bos_token": "<begin>"})
    assert found.ends == {"eos_token_id": 2} and not found.adds_bos


@pytest.mark.parametrize("role", ["eos", "unk"])
def test_a_token_that_is_named_must_be_there(opened, role):
    with pytest.raises(DataError, match=f"tokenizer.json does not know the {role}_token '<gone>'"):
        opened({f"{role}_token": "<gone>"})


def test_the_number_of_tokens(made):
    assert made.vocab == tiny.VOCAB
    assert made.for_vocabulary(tiny.VOCAB) is made is made.for_vocabulary(tiny.VOCAB + 1)
    with pytest.raises(DataError, match=r"has 320 tokens, model\.decoder\.vocab is 319"):
        made.for_vocabulary(tiny.VOCAB - 1)


def test_all_of_a_text_is_encoded_and_nothing_more(made, opened):
    """Whatever tokenizer.json says of truncation and padding."""

    def cut_and_padded(backend):
        backend["truncation"] = {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        backend["padding"] = {
            "strategy": {"Fixed": 99},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        }

    text = "How many circles are there?"
    found = opened({}, cut_and_padded)
    assert found.encode(text) == made.encode(text) and 3 < len(made.encode(text)) < 99


@pytest.mark.parametrize("adds", [True, False])
def test_where_tokens_stand_in_a_prompt(opened, adds):
    """As the library says; a beginning that the text does not hold is at (0, 0), and comes once."""
    found, text = opened({"add_bos_token": adds}), "two circles"
    ids, places = found.encode_all(text)
    assert ids.tolist() == [1] * adds + found.encode(text)
    assert list(map(tuple, places.tolist())) == [(0, 0)] * adds + found.backend.encode(text).offsets
    assert found.encode_all(f"<s>{text}")[0].tolist().count(1) == 1


def test_special_tokens_are_not_text(made):
    assert made.decode([1, *made.encode("a red circle"), 2]) == "a red circle"


def test_the_digest_is_that_of_all_that_ids_follow_from(opened):
    def other(backend):
        backend["model"]["merges"].pop()

    first = opened({}).digest
    assert opened({}).digest == first == opened({"model_max_length": 9}).digest
    others = [opened({}, other), opened({"eos_token": "<s>"}), opened({"add_bos_token": True})]
    assert len({first, *(one.digest for one in others)}) == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: not JSON"),
    ],
)
def test_files_that_cannot_be_read(opened, tmp_path, name, content, words):
    opened({})
    (tmp_path / name).unlink()
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=words):
        Tokenizer(tmp_path)
