"""Several hosts answer one file, each its part, and the last one joins the parts."""

import dataclasses
import json
import os

import pytest
import tiny

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.hosts.environment import one_of_several
from omnifusion_jax.inference.model import Model
from omnifusion_jax.jobs.answer_file import answer_file
from omnifusion_jax.jobs.parts import Part

GREEDY = GenerationConfig(max_new_tokens=3)


@pytest.fixture(scope="module")
def model(tokenizer):
    c = tiny.shallow()
    return Model(c, tiny.arrays(c), tokenizer, name="tiny")


@pytest.fixture
def files(tmp_path):
    lines = [{"messages": [{"role": "user", "content": f"What is {i}?"}]} for i in range(7)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(model, files, part, generation=GREEDY, **options):
    """(answers, errors, kept, retried)"""
    return answer_file(model, *files, "", generation, 2, part=part, **options)[:4]


def names(files):
    return sorted(name for name in os.listdir(files[0].parent) if name != "in.jsonl")


@pytest.mark.parametrize("order", ["input", "done"])
def test_the_last_host_joins_what_all_of_them_wrote(model, files, order):
    alone = files[0], files[1].with_name("alone.jsonl")
    run(model, alone, None, order=order)
    assert run(model, files, Part(2, 3), order=order) == (3, 0, 0, 0)
    assert run(model, files, Part(0, 3), order=order) == (2, 0, 0, 0)
    assert f"{files[1].name}.part-00002-of-00003" in names(files) and not files[1].exists()
    assert run(model, files, Part(1, 3), order=order) == (7, 0, 5, 0)
    header = "out.jsonl.header.json"
    assert names(files) == ["alone.jsonl", "alone.jsonl.header.json", "out.jsonl", header]
    rows = files[1].read_text().splitlines()
    assert sorted(rows) == sorted(alone[1].read_text().splitlines())
    assert order == "done" or files[1].read_bytes() == alone[1].read_bytes()
    told = json.loads((files[1].parent / header).read_text())
    assert told == json.loads((files[1].parent / "alone.jsonl.header.json").read_text()) or order == "done"
    assert told["requests"]["answered"] == 7
    before = files[1].read_bytes()
    for part in (Part(1, 3), Part(0, 2), None):  # each of them finds all done
        assert run(model, files, part, order=order) == (7, 0, 7, 0)
    assert files[1].read_bytes() == before


def test_a_part_that_was_cut_off_goes_on(model, files):
    run(model, files, Part(0, 2))
    file = Part(0, 2).file(files[1])
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert run(model, files, Part(1, 2)) == (4, 0, 0, 0) and not files[1].exists()
    assert run(model, files, Part(0, 2)) == (7, 0, 6, 0)
    assert [json.loads(row)["id"] for row in files[1].read_text().splitlines()] == [*"1234567"]


def test_a_part_with_other_settings_is_not_joined(model, files):
    run(model, files, Part(0, 2))
    with pytest.raises(
        DataError, match=r"part-00000-of-00002 was made by another model.*\n  generation.seed"
    ):
        run(model, files, Part(1, 2), dataclasses.replace(GREEDY, seed=7))
    assert not files[1].exists()


def test_an_input_that_has_grown_has_other_parts(model, files):
    run(model, files, Part(0, 2))
    with open(files[0], "a") as out:
        out.write(files[0].read_text())
    with pytest.raises(DataError, match="part: "):
        run(model, files, Part(0, 2))


def test_a_file_of_one_host_is_not_gone_on_with_by_several(model, files):
    run(model, files, None)
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[: whole.index(b"\n") + 1])
    with pytest.raises(DataError, match=r"holds 1 of 7 answers, and is of one host: go on with one"):
        run(model, files, Part(0, 2))


def test_parts_cover_every_request_once():
    for requests in (0, 1, 7, 1000):
        for of in (1, 2, 3, 8):
            places = [place for number in range(of) for place in Part(number, of).places(requests)]
            assert places == list(range(requests))


@pytest.mark.parametrize(
    ("given", "environ", "found"),
    [
        ((None, None), {}, None),
        ((1, 4), {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, (1, 4)),
        ((None, None), {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        ((None, None), {"SLURM_NTASKS": "4"}, None),
        ((None, None), {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ((None, None), {"JAX_PROCESS_ID": "1", "JAX_NUM_PROCESSES": "2"}, (1, 2)),
        ((0, 1), {}, None),
    ],
)
def test_which_host_this_is(given, environ, found):
    assert one_of_several(*given, environ) == found


@pytest.mark.parametrize("given", [(1, None), (None, 2), (2, 2)])
def test_half_of_what_says_it_is_refused(given):
    with pytest.raises(ConfigError, match="--host=NUMBER, from 0, and --of=COUNT"):
        one_of_several(*given, {})


def test_machines_of_a_tpu_slice_are_told_apart_or_refused():
    """Each has the same command and an environment that names all of them."""
    environ = {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}
    with pytest.raises(ConfigError, match=r"one of several of a TPU slice.*give each --host=NUMBER"):
        one_of_several(None, None, environ)
    assert one_of_several(1, 2, environ) == (1, 2)
    assert one_of_several(None, None, environ | {"JAX_PLATFORMS": "cpu"}) is None
