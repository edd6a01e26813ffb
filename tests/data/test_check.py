"""What is wrong with a data set is counted by reason while a run compiles, and decides whether it trains."""

import functools
import json
import os
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.config import DataConfig
from omnifusion_jax.data.check import Check, Report, reason, start_check
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.data.sources import JsonSource, SyntheticSource
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def prepare():
    return tiny.prepare(Tokenizer(locate("omnifusion-tiny-decoder")), 96)


def talk(i, question="<image>\nWhat?", **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]
    return {"id": f"r{i}", "image": "good.png", "conversations": turns, **fields}


def data(folder, count, bad):
    """`count` records, those of `bad` by index instead of good ones."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(
        folder / "good.png"
    )
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:-400])
    (folder / "text.png").write_text("I am not a picture.")
    lines = [bad[i] if isinstance(bad.get(i), str) else json.dumps(bad.get(i, talk(i))) for i in range(count)]
    (folder / "d.jsonl").write_text("\n".join(lines))
    return JsonSource(folder / "d.jsonl", folder)


WRONG = {
    0: talk(0, image="gone.png"),
    7: talk(7, image="gone too.png"),
    8: talk(8, "cat " * 200, image=None),
    9: talk(9, "cat " * 300, image=None),
    10: talk(10, "dog " * 400, image=None),
    11: talk(11, "dog " * 500, image=None),
    450: talk(450, image="text.png"),
    451: '{"id": "x", ',
    452: talk(452, image="cut.png"),  # its header is whole
}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_record_is_looked_at_and_what_is_wrong_is_counted_by_reason(prepare, tmp_path, processes):
    check = Check(data(tmp_path, 501, WRONG), prepare, processes)
    report = check.wait()
    assert (report.records, report.checked, report.bad, report.done) == (501, 501, 8, True)
    file = tmp_path / "d.jsonl"
    long = (
        "tokens, but max_length is 96. "
        "Shorten or split the dialogue, or raise max_length (data.max_length in training)"
    )
    found = report.reasons
    assert {name: number for name, (number, _) in found.items()} == {
        "# tokens, but max_length is #": 4,
        "there is no such file": 2,
        "not an image in a known format (JPEG, PNG, WEBP, BMP, TIFF, GIF)": 1,
        "not JSON (Expecting property name enclosed in double quotes)": 1,
    }
    assert list(found)[:2] == ["# tokens, but max_length is #", "there is no such file"]
    _, (first, second, third) = found["# tokens, but max_length is #"]
    assert [first[: len(f"{file}:9")], second[: len(f"{file}:10")], third[: len(f"{file}:11")]] == [
        f"{file}:9",
        f"{file}:10",
        f"{file}:11",
    ]
    assert first.endswith(long) and '(id "r8")' in first
    _, examples = found["there is no such file"]
    assert examples == [
        f'{file}:{i + 1} (id "r{i}"): {tmp_path}/{name}: there is no such file. Check the name.'
        for i, name in ((0, "gone.png"), (7, "gone too.png"))
    ]
    lines = str(report).splitlines()
    assert lines[:2] == [
        "data: 501 records checked (text, headers of pictures), 8 cannot be used:",
        "  4 x # tokens, but max_length is #",
    ]
    assert (
        lines[2:5] == [f"      {example}" for example in (first, second, third)]
        and len(lines) == 1 + 4 + 3 + 2 + 1 + 1
    )
    assert not any(thread.is_alive() for thread in check.threads)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            'd.jsonl:5 (id "a. B"): pics/1.png: there is no such file. Check the name.',
            "d.json[7]: pics/x: y.png: there is no such file. Check the name.",
        ),
        ("a:1: turn 3 is empty. Remove the turn", "b:2: turn 12 is empty. Remove the turn"),
        ("a:1: turn 0 is from 'bot'; known are human", "a:1: turn 0 is from 'ai'; known are human"),
        (
            "a:1: p.png: 8000 x 8,000 pixels; 1 to 50,000,000 (max_pixels) are allowed.",
            "a:2: q.png: 9 x 70 pixels; 1 to 5 (max_pixels) are allowed.",
        ),
    ],
)
def test_reasons_are_the_same_whatever_the_record(one, other):
    assert reason(one) == reason(other)
    assert reason(one) != reason("a:1: another thing. Do it")


def test_dialogues_that_are_too_long_count_for_themselves_where_they_are_left_out():
    long, gone = DataError("d:1: 9 tokens", "too_long"), DataError("d:2: gone. Add it", "missing")
    reports = [Report(4, skip_long) for skip_long in (False, True)]
    for report in reports:
        report.add(3, [(2, gone), (0, long)])
        report.add(1, [(1, gone)])
    strict, left = reports
    assert (strict.bad, strict.too_long) == (3, 0) and (left.bad, left.too_long) == (2, 1)
    lines = str(left).splitlines()
    assert lines[1] == "  2 x gone"
    assert lines[-1] == "  1 are too long, and left out for that (data.on_long=skip)"
    assert strict.reasons == {"gone": (2, ["d:2: gone. Add it"] * 2), "# tokens": (1, ["d:1: 9 tokens"])}


def test_the_first_records_are_shown_whatever_the_order_of_portions():
    report = Report(4000)
    for portion in (7, 3, 5, 1, 9):
        report.add(200, [(portion * 200, DataError(f"d.json[{portion * 200}]: broken", "damaged"))])
    ((number, examples),) = report.reasons.values()
    assert number == 5 and examples == [f"d.json[{i}]: broken" for i in (200, 600, 1000)]


def test_a_check_is_done_when_it_failed():
    report = Report(4)
    report.add(3, [])
    assert not report.done
    report.fail(ValueError("broke"))
    assert report.done and str(report).splitlines() == [
        "data: 3 of 4 records checked (text, headers of pictures), nothing wrong",
        "  The check itself ended early: broke",
    ]


def test_a_check_gives_way_to_training_and_leaves_long_dialogues_out(prepare):
    class Says(list):
        def __getitem__(self, i):
            if i:
                raise DataError(f"niceness {os.nice(0)}")
            return tiny.dialogue((("user", "What?"), ("assistant", "cat " * 200)))

    report = start_check(Says([0, 1]), prepare, 0, True).wait()
    assert (report.checked, report.too_long, report.bad) == (2, 1, 1)
    assert report.reasons["niceness #"] == (1, [f"niceness {min(19, os.nice(0) + 10)}"])


def run(prepare, source, on_bad_sample="raise", bad_share=0.01, **settings):
    settings |= {
        "on_bad_sample": on_bad_sample,
        "bad_share": bad_share,
        "check": functools.partial(start_check, source, prepare, 1),
    }
    settings |= {"tiles": prepare.tiles}
    return Batches(source, prepare, batch_size=2, length=96, **settings)


def test_a_good_set_is_said_to_be_good_before_the_second_batch(prepare, tmp_path, capsys):
    batches = run(prepare, data(tmp_path, 250, {}))
    next(batches)
    assert capsys.readouterr().out == ""  # the first step may compile
    next(batches)
    next(batches)
    assert capsys.readouterr().out == "data: 250 records checked (text, headers of pictures), nothing wrong\n"
    assert batches.check is None


def test_one_problem_anywhere_stops_a_strict_run_with_the_count_of_all(prepare, tmp_path, capsys):
    batches = run(prepare, data(tmp_path, 501, WRONG), seed=1)
    next(batches)
    with pytest.raises(DataError) as caught:
        next(batches)
    message = str(caught.value)
    assert message.startswith(
        "data: 501 records checked (text, headers of pictures), 8 cannot be used:\n  4 x # tokens"
    )
    assert message.endswith(
        "(data.on_bad_sample=skip leaves such samples out and counts them; "
        "data.check=off starts without looking)"
    )
    batches.close()
    assert capsys.readouterr().out == ""  # it has been said


def test_a_bad_sample_in_the_first_batch_is_not_reported_alone(prepare, tmp_path, capsys):
    batches = run(prepare, data(tmp_path, 501, WRONG), shuffle=False)
    with pytest.raises(DataError) as caught:
        next(batches)
    first, second, *_ = str(caught.value).splitlines()
    assert (
        "gone.png: there is no such file" in first
        and second == "data: 501 records checked (text, headers of pictures), 8 cannot be used:"
    )
    batches.close()
    assert capsys.readouterr().out == ""


def test_a_run_that_skips_goes_on_below_its_share_and_stops_above(prepare, tmp_path, capsys):
    source = data(tmp_path, 501, WRONG)
    kept = run(prepare, source, "skip", 0.016, seed=1)  # 8 of 501
    next(kept)
    next(kept)
    assert capsys.readouterr().out.endswith("\nThey are left out and counted.\n")
    stopped = run(prepare, source, "skip", 0.0158, seed=1)  # 7
    next(stopped)
    with pytest.raises(
        DataError, match=r"Too many: of all 501 no more than 7 may be \(data.bad_share=0.0158\)"
    ):
        next(stopped)
    stopped.close()
    assert capsys.readouterr().out == ""


class Slow(JsonSource):
    """Record 300 takes half a minute to read, where the check has not yet said a word."""

    def __getitem__(self, i):
        time.sleep(30 * (i == 300))
        return super().__getitem__(i)


def test_a_check_that_takes_long_goes_on_beside_training(prepare, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("omnifusion_jax.data.pipeline.WAIT", 1)
    data(tmp_path, 501, {0: talk(0, image="gone.png"), 400: talk(400, image="gone.png")})
    slow = start_check(Slow(tmp_path / "d.jsonl", tmp_path), prepare, 1)
    source = JsonSource(tmp_path / "d.jsonl", tmp_path)
    batches = Batches(
        source,
        prepare,
        batch_size=2,
        length=96,
        tiles=prepare.tiles,
        on_bad_sample="skip",
        check=lambda: slow,
        seed=1,
    )
    while not slow.report.checked:
        time.sleep(0.1)
    next(batches)
    start = time.monotonic()
    next(batches)
    assert 1 <= time.monotonic() - start < 10
    next(batches)
    out = capsys.readouterr().out
    assert out.startswith(
        "data: 200 of 501 records checked (text, headers of pictures), 1 cannot be used:\n"
        "  1 x there is no such file\n"
    )
    assert out.endswith(" so far; the check goes on beside training\n") and out.count("beside training") == 1
    start = time.monotonic()
    batches.close()
    assert (
        time.monotonic() - start < 5
        and "when the run ended" in capsys.readouterr().out
        and batches.check is None
    )


def test_a_problem_that_turns_up_later_stops_a_strict_run_then(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr("omnifusion_jax.data.pipeline.WAIT", 0)
    batches = run(prepare, data(tmp_path, 501, {450: talk(450, image="gone.png")}), seed=1, shuffle=False)
    with pytest.raises(DataError, match="1 cannot be used:\n  1 x there is no such file"):
        for _ in range(200):  # 400 records; training itself has not met it
            next(batches)
            time.sleep(0.3)
    batches.end_check()


def test_a_check_that_breaks_says_so_and_training_goes_on(prepare, tmp_path, capsys):
    class Broken(JsonSource):
        def __getitem__(self, i):
            raise KeyError("a programmer's mistake")

    data(tmp_path, 20, {})
    check = start_check(Broken(tmp_path / "d.jsonl", tmp_path), prepare, 1)
    batches = Batches(
        JsonSource(tmp_path / "d.jsonl", tmp_path),
        prepare,
        batch_size=2,
        length=96,
        tiles=prepare.tiles,
        check=lambda: check,
    )
    next(batches)
    next(batches)
    assert not batches.state()["checked"]
    out = capsys.readouterr().out
    assert (
        out.startswith("data: 0 of 20 records checked")
        and "The check itself ended early: in a worker process:" in out
        and 'KeyError: "a programmer\'s mistake"' in out
    )


def looked(*records):
    """The part of a state that says at how many records each row has looked."""
    return {"rows": {str(row): [count, 0, []] for row, count in enumerate(records)}}


def test_what_has_been_checked_is_not_checked_again(prepare, tmp_path):
    """By the check of an earlier start, or by an epoch of training; other data is."""
    source, started = data(tmp_path, 20, {}), []
    make = lambda: Batches(
        source, prepare, batch_size=2, length=96, tiles=prepare.tiles, check=lambda: started.append(1)
    )
    first = run(prepare, source)
    next(first)
    begun = first.state()
    next(first)
    done = first.state()
    assert (begun["checked"], done["checked"]) == (False, True)
    for state, checks in (
        (done, 0),
        (begun, 1),
        (begun | looked(10, 10), 0),
        (begun | looked(10, 9), 1),
        (done | {"content": "other"}, 1),
        (done | {"records": 21} | looked(20, 20), 1),
    ):
        later, started[:] = make(), []
        later.restore(json.loads(json.dumps(state)))
        assert not started  # nothing is read yet, and perhaps never
        next(later)
        later.close()
        next(later)
        assert len(started) == checks, state
        later.close()


def test_synthetic_pictures_are_not_checked(prepare):
    assert start_check(SyntheticSource("questions", 6), prepare, 1) is None


def test_a_check_leaves_no_process_behind(prepare, tmp_path):
    data(tmp_path, 501, {})
    check = start_check(Slow(tmp_path / "d.jsonl", tmp_path), prepare, 3)
    processes = [worker.process for worker in check.close.peek()[2][1]]
    assert len(processes) == 3 and [os.getsid(p.pid) for p in processes] == [p.pid for p in processes]
    start = time.monotonic()
    del check
    assert time.monotonic() - start < 5 and all(p.wait(5) == -9 for p in processes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"check": "always"}, "data.check is 'always'"),
        ({"bad_share": 1.5}, "share of the records from 0 to 1"),
    ],
)
def test_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(path="d.json", **settings).validate()
