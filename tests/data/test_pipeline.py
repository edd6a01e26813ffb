"""Batches follow from the seed, lose and repeat nothing, go on where they were, and count what they omit."""

import itertools
import json
import re
import time

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omnifusion_jax.batch import FEATURE, PADDING, SPECIAL, TEXT, Sample
from omnifusion_jax.checkpoints.storage.bundled import locate
from omnifusion_jax.data import synthetic
from omnifusion_jax.data.pipeline import Batches, PatchSource, keep
from omnifusion_jax.data.sources import ENDLESS, JsonSource, SyntheticSource
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import DataError


class Numbers:
    """Sample i holds the token i; samples in `bad` cannot be used."""

    def __init__(self, count, bad=()):
        self.count, self.bad = count, bad

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        if i in self.bad:
            raise DataError(f"number {i}: bad. Do without it")
        empty = np.zeros(1, np.int32)
        return Sample(np.array([i], np.int32), empty, empty, np.zeros(1, np.float32), {})


def numbers(source, batch_size=4, **settings):
    return Batches(source, keep, batch_size=batch_size, length=1, tiles=tiny.tiles(2), **settings)


def take(batches, count):
    """Token 0 of every row of the next `count` batches."""
    return [batch.tokens[:, 0].tolist() for batch in itertools.islice(batches, count)]


def flat(rows):
    return list(itertools.chain.from_iterable(rows))


def through_json(state):
    return json.loads(json.dumps(state))


# --- order


def test_the_order_is_a_function_of_the_seed():
    first, second, other = (take(numbers(Numbers(100), seed=seed), 50) for seed in (3, 3, 4))
    assert first == second != other
    assert take(numbers(Numbers(9), shuffle=False), 3) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 1, 2]]


few = settings(max_examples=25)


@few
@given(count=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_holds_each_sample_once(count, batch_size, seed):
    seen = flat(take(numbers(Numbers(count), batch_size, seed=seed), -(-3 * count // batch_size)))
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_differ():
    seen = flat(take(numbers(Numbers(20)), 15))
    assert len({tuple(seen[i : i + 20]) for i in (0, 20, 40)}) == 3


def test_a_source_smaller_than_the_batch_fills_it_several_times():
    (row,) = take(numbers(Numbers(3), 8), 1)
    assert sorted(row[:3]) == sorted(row[3:6]) == [0, 1, 2] and len(row) == 8


def test_an_endless_source_costs_nothing_to_shuffle():
    start = time.perf_counter()
    batches = numbers(Numbers(ENDLESS), 64)
    seen = flat(take(batches, 10))
    far = {str(row): [2**29 // 64, 0, []] for row in range(64)}
    batches.restore(batches.state() | {"rows": far})
    seen += flat(take(batches, 1))
    assert time.perf_counter() - start < 20
    assert len(set(seen)) == len(seen) and max(seen) > 2**29 and min(seen) < 2**28


# --- position


@settings(max_examples=10)
@given(
    count=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    before=st.integers(0, 6),
    read_on=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_a_restored_position_goes_on_exactly(count, batch_size, before, read_on, seed):
    whole = take(numbers(Numbers(count), batch_size, seed=seed), before + 4)
    batches = numbers(Numbers(count), batch_size, seed=seed)
    assert take(batches, before) == whole[:before]
    state = through_json(batches.state())
    take(batches, read_on)
    batches.restore(state)
    assert take(batches, 4) == whole[before:]
    fresh = numbers(Numbers(count), batch_size, seed=seed)
    fresh.restore(state)
    assert take(fresh, 4) == whole[before:]


# --- bad samples


def test_a_bad_sample_stops_the_run_by_default():
    batches = numbers(Numbers(10, bad={5}), shuffle=False)
    take(batches, 1)
    with pytest.raises(DataError) as caught:
        next(batches)
    assert (
        str(caught.value)
        == "number 5: bad. Do without it. (data.on_bad_sample=skip leaves such samples out and counts them)"
    )


def test_bad_samples_are_left_out_and_each_is_counted_once():
    def make():
        return numbers(Numbers(500, bad={7, 300}), on_bad_sample="skip", seed=2)

    batches, again = make(), make()
    seen = flat(take(batches, 120))
    assert sorted(seen)[:8] == [0, 1, 2, 3, 4, 5, 6, 8] and len(set(seen)) == 480 and not {7, 300} & set(seen)
    take(batches, 5)
    assert sorted(batches.left_out()) == [
        "left out: number 300: bad. Do without it",
        "left out: number 7: bad. Do without it",
    ]
    assert (batches.skipped, batches.seen) == (2, 502)
    assert batches.counts() == {"skipped": 2, "too_long": 0, "cut": 0}
    assert seen == flat(take(again, 120))
    take(batches, 124)
    assert batches.skipped == 2 and batches.seen > 996  # the next epoch meets them again


def test_a_set_of_24_with_one_bad_record_trains_for_many_epochs():
    """A row replaces it by its own next record, so that rows differ in how far they are, but only by that."""
    batches = numbers(Numbers(24, bad={3}), on_bad_sample="skip")
    seen = flat(take(batches, 23 * 20 // 4))
    assert all(18 <= seen.count(i) <= 22 for i in range(24) if i != 3) and seen.count(3) == 0
    assert batches.left_out() == ["left out: number 3: bad. Do without it"] and batches.skipped == 1


def test_what_is_too_long_counts_for_itself():
    """A run goes on with the counts of an earlier start."""

    class Long(Numbers):
        def __getitem__(self, i):
            if i in (1, 6):
                raise DataError(f"number {i}: long", "too_long")
            return super().__getitem__(i)

    make = lambda: numbers(Long(24, bad={3}), on_bad_sample="skip", on_long="skip", shuffle=False)
    batches, later = make(), make()
    take(batches, 1)
    assert batches.counts() == {"skipped": 2, "too_long": 1, "cut": 0}
    later.restore(through_json(batches.state()))
    assert later.counts() == batches.counts()
    take(later, 1)
    assert later.counts() == {"skipped": 3, "too_long": 2, "cut": 0}
    strict = numbers(Long(24, bad={3}), on_bad_sample="skip", on_long="raise", shuffle=False)
    with pytest.raises(DataError, match=r"number 1: long\. \(data\.on_long=skip leaves such") as caught:
        take(strict, 1)
    assert caught.value.reason == "too_long"
    with pytest.raises(DataError, match=r"number 3: bad\. Do without it\. \(data\.on_bad_sample=skip"):
        take(numbers(Long(24, bad={3}), on_long="skip", shuffle=False), 1)


def test_dialogues_that_were_cut_are_counted():
    class Cut(Numbers):
        def __getitem__(self, i):
            return super().__getitem__(i)._replace(cut=2 * (i in (2, 9)))

    batches = numbers(Cut(12), shuffle=False)
    found = []
    for _ in range(4):
        take(batches, 1)
        found.append(batches.counts()["cut"])
    assert found == [1, 1, 2, 3]  # the last is the second epoch's


def until_stopped(batches):
    rows = []
    with pytest.raises(DataError) as caught:
        while len(rows) < 2000:
            rows += take(batches, 1)
    return rows, str(caught.value)


def test_a_run_that_was_stopped_and_restored_stops_there_again():
    """What it had looked at is forgotten."""
    batches = numbers(Numbers(24, bad={3, 4}), 1, on_bad_sample="skip", shuffle=False)
    begun = through_json(batches.state())
    first = until_stopped(batches)
    batches.restore(begun)
    assert until_stopped(batches) == first and first[1].startswith("2 of 5 records are bad; ")


@pytest.mark.parametrize(
    ("records", "bad", "share", "stops"),
    [
        (24, 1, 0.01, False),  # one always may be
        (24, 2, 0.01, True),
        (24, 2, 0.09, False),  # 2.16
        (24, 3, 0.09, True),
        (200, 2, 0.01, False),
        (200, 3, 0.01, True),
        (40, 1, 0.0, False),
        (40, 2, 0.0, True),
        (1, 1, 0.5, True),  # nothing is left to learn from
        (3, 3, 1.0, True),
        (3, 2, 1.0, False),
    ],
)
def test_what_share_may_be_bad(records, bad, share, stops):
    """It stops at the first record too many, whichever the order.

    While the share is kept it never does, however many epochs go by.
    """
    batches = numbers(
        Numbers(records, bad=set(range(bad))), 1, on_bad_sample="skip", bad_share=share, seed=records
    )
    if not stops:
        take(batches, 3 * (records - bad) + 1)
        assert batches.skipped == bad and batches.seen > 3 * records
        return
    _, message = until_stopped(batches)
    first = "all records are left out" if bad == records else rf"{bad} of (\d+) records are bad"
    found = re.match(
        rf"{first}; of all {records} no more than \d+ may be \(data.bad_share={share:g}\):\n", message
    )
    assert found and bad <= int((found.groups() or [records])[0]) <= records
    assert message.count("bad. Do without it") == bad


def test_a_large_set_that_is_mostly_bad_stops_early():
    """It stops long before 1 % of a million records have been met.

    But a share that is kept is never taken for one that is not.
    """
    _, message = until_stopped(broken := numbers(Numbers(10**6, bad=range(10**6)), on_bad_sample="skip"))
    assert broken.seen == 0 and message.startswith(
        "4 of 4 records are bad; of any 10,000 no more than 143 may be (data.bad_share=0.01)"
    )
    _, message = until_stopped(half := numbers(Numbers(10**6, bad=range(0, 10**6, 20)), on_bad_sample="skip"))
    met = int(message.split()[0])
    assert half.seen < 1000 and message.count("\n") == min(met, 10) and met >= half.skipped
    kept = numbers(Numbers(10**6, bad=range(0, 10**6, 100)), 100, on_bad_sample="skip")
    take(kept, 200)
    assert 150 < kept.skipped < 250


def test_records_in_their_own_order_may_begin_with_bad_ones():
    """Without shuffling the first records say nothing of the others."""
    assert take(numbers(Numbers(2000, bad=range(20)), on_bad_sample="skip", shuffle=False), 1) == [
        [20, 21, 22, 23]
    ]


def test_too_many_bad_samples_stop_the_run_at_the_same_place_after_a_restart():
    def make():
        return numbers(Numbers(1000, bad=set(range(0, 1000, 60))), on_bad_sample="skip")  # 17

    whole, message = until_stopped(whole_run := make())
    assert re.match("11 of ([0-9]{3}) records are bad; of all 1,000 no more than 10 may be", message)
    before, problems = whole_run.position, message.split("\n")[1:]
    assert len(problems) == 10
    batches = make()
    take(batches, len(whole) // 2)
    state = through_json(batches.state())
    resumed = make()
    resumed.restore(state)
    rest, again = until_stopped(resumed)
    assert rest == whole[len(whole) // 2 :] and resumed.position == before
    # what an earlier start met is not named again
    assert again.split("\n")[0] == message.split("\n")[0] and set(again.split("\n")[1:]) < set(problems)


def test_a_state_holds_no_messages_and_they_are_read_again():
    first = numbers(Numbers(100, bad={3, 97}), on_bad_sample="skip", bad_share=0.1)
    take(first, 25)
    assert sorted(first.state()["bad"]) == [3, 97] and "number" not in json.dumps(first.state())
    again, mended = (
        numbers(Numbers(100, bad=bad), on_bad_sample="skip", bad_share=0.1) for bad in ({3, 97}, {3})
    )
    for later in (again, mended):
        later.restore(through_json(first.state()))
        assert later.skipped == 2
    assert (
        again.left_out() == first.left_out()
        and sorted(again.left_out())[0] == "left out: number 3: bad. Do without it"
    )
    assert sorted(mended.left_out())[1].startswith(
        "left out: record 97 could not be used when an earlier start"
    )


@pytest.mark.parametrize("bad", [0, 10, 11, 1300])
def test_the_end_names_ten_records_and_counts_the_others(bad):
    batches = numbers(Numbers(3000, bad=set(range(bad))), on_bad_sample="skip", bad_share=0.5, shuffle=False)
    take(batches, 1)
    lines = batches.left_out()
    assert lines[:10] == [f"left out: number {i}: bad. Do without it" for i in range(min(bad, 10))]
    assert lines[10:] == {11: ["left out: 1 more"], 1300: ["left out: 1,290 more"]}.get(bad, [])


def test_what_was_learned_of_other_data_is_forgotten():
    """The position is kept: whether to go on with other data at all is asked elsewhere."""
    first = numbers(Numbers(30, bad={3}), on_bad_sample="skip")
    take(first, 7)
    edited = Numbers(30)
    edited.fingerprint = "other"
    for source in (Numbers(3), edited):
        later = numbers(source, on_bad_sample="skip")
        later.restore(through_json(first.state()))
        assert (later.seen, later.skipped) == (first.seen, 0) and first.skipped == 1
        assert later.position["history"] == []


def test_a_state_tells_the_content_of_a_file(tmp_path):
    def content(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return numbers(JsonSource(tmp_path / name)).state()["content"]

    assert (
        content("a.jsonl", '{"id": "a"}')
        == content("b.jsonl", '{"id": "a"}')
        != content("c.jsonl", '{"id": "b"}')
    )
    captions, questions = (
        numbers(SyntheticSource(kind, 6)).state()["content"] for kind in ("captions", "questions")
    )
    assert captions != questions


def test_a_defect_is_not_taken_for_a_bad_sample():
    class Defect(Numbers):
        def __getitem__(self, i):
            raise KeyError("a programmer's mistake")

    with pytest.raises(KeyError):
        next(numbers(Defect(5), on_bad_sample="skip"))
    batches = numbers(Defect(5), on_bad_sample="skip", num_workers=1)
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"in a worker process:\n(.|\n)*KeyError: .a programmer's mistake"
        ):
            next(batches)


# --- what a batch holds


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(locate("omnifusion-tiny-decoder"))


def test_shapes_and_kinds(tokenizer):
    prepare = tiny.prepare(tokenizer, 96, 48, 8)
    batch = next(
        Batches(SyntheticSource("questions", 6), prepare, batch_size=3, length=96, tiles=prepare.tiles)
    )
    assert [(a.shape, a.dtype) for a in [*batch[:-2], *batch.media["image"]]] == [
        *[((3, 96), t) for t in (np.int32, np.int32, np.int32, np.float32, np.int32, np.int32)],
        ((3,), np.int32),
        ((3, 1, 48, 48, 3), np.uint8),
    ]
    assert (
        np.bincount(batch.kind.ravel(), minlength=FEATURE + 1)[[FEATURE, TEXT]] > [3 * 36 - 1, 3 * 10]
    ).all()
    assert batch.items.tolist() == [1, 1, 1] and list(batch.media) == ["image"]
    assert ((batch.kind == PADDING) == (batch.segments == 0)).all() and set(np.unique(batch.segments)) <= {
        0,
        1,
    }
    for row in range(3):
        n = batch.segments[row].sum()
        assert batch.positions[row].tolist() == [*range(n), *[0] * (96 - n)]
        assert batch.index[row][batch.kind[row] == FEATURE].tolist() == list(range(36))
        assert batch.weights[row, :n][batch.kind[row, :n] == SPECIAL].sum() == 0 < batch.weights[row].sum()
    assert all(a.flags.writeable and a.flags.c_contiguous for a in [*batch[:-2], *batch.media["image"]])


def test_a_dialogue_without_a_picture_has_a_blank_one_beside_others_and_none_alone(tokenizer):
    prepare = tiny.prepare(tokenizer, 96, 48, 8)
    source = [SyntheticSource("text", 6)[0], SyntheticSource("questions", 6)[0]]
    alone, both = (
        next(Batches(s, prepare, batch_size=2, length=96, tiles=prepare.tiles, shuffle=False))
        for s in (source[:1], source)
    )
    assert alone.media["image"][0].shape == (2, 0, 48, 48, 3) and alone.items.tolist() == [0, 0]
    assert not (alone.kind >= FEATURE).any() and not (both.kind[0] >= FEATURE).any()
    assert both.media["image"][0].shape == (2, 1, 48, 48, 3) and both.items.tolist() == [0, 1]
    assert [picture.any() for picture in both.media["image"][0]] == [False, True]


def test_patches_name_what_covers_them():
    source = PatchSource(6)
    batch = next(Batches(source, keep, batch_size=2, length=36, tiles=tiny.tiles(96), shuffle=False))
    for i in range(2):
        scene, rng = synthetic.scene_and_rng(i, "train")
        assert [synthetic.CELL_WORDS[t] for t in batch.tokens[i]] == synthetic.patch_words(scene, 6)
        assert (batch.media["image"][0][i, 0] == synthetic.render(scene, rng)).all()
    assert (
        (batch.kind == FEATURE).all()
        and (batch.weights == 1).all()
        and batch.index[0].tolist() == list(range(36))
    )
    assert len(source) == ENDLESS
    unseen, (scene, rng) = PatchSource(6, "held-out")[3], synthetic.scene_and_rng(3, "held-out")
    assert (unseen.media["image"][0][0] == synthetic.render(scene, rng)).all()


# --- worker processes


def test_worker_processes_change_nothing(tokenizer, tmp_path):
    """The same batches, the same bad samples, and positions that fit any number of workers."""
    records = []
    for i in range(11):
        if i != 4:
            Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(tmp_path / f"{i}.png")
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"cat {i}"}]
        records.append({"id": f"r{i}", "image": f"{i}.png", "conversations": talk})
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))

    def make(num_workers, on_bad_sample="skip", **settings):
        prepare, source = tiny.prepare(tokenizer, 96, 8, 8), JsonSource(path, tmp_path)
        settings |= {"tiles": prepare.tiles, "num_workers": num_workers, "on_bad_sample": on_bad_sample}
        return Batches(source, prepare, batch_size=3, length=96, **settings)

    def same(some, others):
        return all(
            (a == b).all() for a, b in zip(jax.tree.leaves(some), jax.tree.leaves(others), strict=True)
        )

    alone = make(0)
    whole = [next(alone) for _ in range(5)]  # an epoch and a half
    begun, spread, back = make(0), make(2), make(0)
    assert same([next(begun)], whole[:1])
    spread.restore(through_json(begun.state()))
    assert same([next(spread), next(spread)], whole[1:3])
    back.restore(through_json(spread.state()))
    assert same([next(back), next(back)], whole[3:])
    assert back.state() == alone.state() and alone.state()["bad"] == [4]
    assert f'{path}:5 (id "r4"): {tmp_path / "4.png"}: there is no such file' in alone.left_out()[0]
    spread.close()

    strict = make(1, "raise", shuffle=False)
    next(strict)
    message = (
        r'd\.jsonl:5 \(id "r4"\): .*4\.png: there is no such file\. Check the name\. '
        r"\(data\.on_bad_sample=skip"
    )
    with pytest.raises(DataError, match=message):
        next(strict)
    strict.close()
