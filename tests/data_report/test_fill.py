"""Estimated rows against sums by hand, and against the batches of a run."""

import dataclasses

import numpy as np
import pytest
import talks
from talks import talk

from omnifusion_jax.data.packing import Alone, Fullest
from omnifusion_jax.data.readers import BadSample
from omnifusion_jax.data_report.fill import Estimate, Sizes, bucketed, fill
from omnifusion_jax.tables import OBJECTIVES


def filled(c):
    return fill(c, *talks.gathered(c))


def test_dialogues_of_one_length_by_hand(tmp_path):
    file = talks.write(tmp_path, [talk(i) for i in range(60)])
    (n,) = {one["tokens"] for one in talks.gathered(talks.config(file))[1].found[0].records}
    found = filled(talks.config(file, max_length=int(3 * n + 1), batch_size=5))
    assert found["run"] is None and found["bucketed"] == 1.0
    assert found["padded"] == pytest.approx(n / (3 * n + 1))
    assert found["steps"] == 12  # 60 dialogues, 5 a step
    single, double, fourfold = found["packed"]
    assert single["row_length"] == 3 * n + 1 and single["row_tiles"] == 1
    assert single["tokens"] == pytest.approx(3 * n / (3 * n + 1)) and single["tiles"] == 0
    assert (single["dialogues"], single["rows"], single["steps"]) == (3, 20, 4)
    assert (double["dialogues"], double["rows"], double["steps"]) == (6, 10, 2)
    assert (fourfold["dialogues"], fourfold["rows"]) == (12, 5)


def test_tiles_that_suit_a_row(tmp_path):
    """Of like dialogues with a picture each, a row has a tile for each that fits it, and no more."""
    talks.picture(tmp_path / "a.png")
    file = talks.write(tmp_path, [talk(i, image="a.png") for i in range(40)])
    c = talks.config(file, images=tmp_path)
    n = int(talks.gathered(c)[1].found[0].records["tokens"][0])
    c.data.max_length = 4 * n
    found = filled(c)
    assert [(one["row_tiles"], one["tokens"], one["tiles"]) for one in found["packed"]] == [
        (4, 1.0, 1.0),
        (8, 1.0, 1.0),
        (16, 1.0, 1.0),
    ]


def test_the_rows_of_a_run(tmp_path):
    """Tiles are those of the config, or as many as a row of features has, or as one picture may have."""
    talks.picture(tmp_path / "a.png")
    file = talks.write(tmp_path, [talk(0, image="a.png")])  # 36 positions a tile
    settings = {"images": tmp_path, "packing": True}
    read = lambda **more: talks.opened(talks.config(file, **settings | more))
    reading = read(row_length=400)
    assert (reading.length, reading.usual, reading.choose) == (400, 11, Fullest(16, 400, 11))
    reading = read(row_tiles=3, window=5)
    assert (reading.length, reading.usual, reading.choose) == (256, 3, Fullest(5, 256, 3))
    reading = read(packing=False)
    assert (reading.length, reading.usual, reading.choose) == (256, 1, Alone())
    c = talks.config(file, **settings, max_length=100)
    c.model.image.fit = "tiles"  # five at most with the usual grids, of which a row shows no more than two
    assert talks.opened(c).usual == 5


def test_buckets_by_hand():
    # 32 dialogues are sorted together, two a batch: 1 1 | 3 3 | ... ; the last two are on their own
    lengths = [1, 3] * 16 + [5, 1]
    assert bucketed(np.array(lengths), 2) == pytest.approx((16 * 1 + 16 * 3 + 6) / (16 + 48 + 10))


def test_sizes_stand_for_records(tmp_path, monkeypatch):
    """Those of which nothing is learned are taken too; of a source without an end the first stand for all."""
    question = {"conversations": [{"from": "human", "value": "What?"}]}
    c = talks.config(talks.write(tmp_path, ["{", question, talk(2)]))
    c.model.layout = "original"
    data, found = talks.gathered(c)
    sizes = Sizes(data.source, found)
    sizes.ask([(5, 0), (6, 1), (7, 2)])
    lengths = [one.length for n in (6, 7) for one in sizes.look(n)]
    assert isinstance(sizes.look(5), BadSample) and lengths == found.found[0].records["tokens"][1:].tolist()
    monkeypatch.setattr("omnifusion_jax.data_report.gather.ENOUGH", 4)
    data, found = talks.gathered(talks.config("synthetic:captions"))
    sizes = Sizes(data.source, found)
    sizes.ask([(n, n) for n in range(8)])
    lengths = found.found[0].records["tokens"].tolist()
    assert [sizes.look(n)[0].length for n in range(8)] == lengths * 2 and len(set(lengths)) > 1


def test_rows_of_pairs_have_room_for_both_answers(tmp_path):
    record = lambda i: {"question": "What?", "chosen": "cat " * i, "rejected": "dog " * i}
    path = talks.write(tmp_path, [record(i) for i in (1, 20, 35, 50)])
    c = talks.config(path, packing=True, max_length=70, row_length=140, window=1)
    c.objective = "preference"
    data, found = talks.gathered(c)
    (one,) = found.found
    both = [len(data.prepare(data.source[i]).tokens) for i in range(4)]
    assert one.records["tokens"].tolist() == both and max(both) > 70
    report = fill(c, data, found)
    assert [row["row_length"] for row in report["packed"]] == [140, 280, 560]
    assert report["run"]["dialogues"] == 1 and report["run"]["rows"] == 4
    assert report["padded"] == pytest.approx(np.mean(both) / 140)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_estimate_has_the_rows_of_the_run(tmp_path, shuffle):
    """Of two sets, one of them twice an epoch, with records that are left out."""
    rng = np.random.default_rng(0)
    long = lambda count: [talk(i, "cat " * rng.integers(1, 60)) for i in range(count)]
    records = long(40)
    records[3], records[30] = talk(3, image="gone.png"), talk(30, "cat " * 300)
    a, b = talks.write(tmp_path, records, "a.jsonl"), talks.write(tmp_path, long(15), "b.json")
    settings = {"on_bad_sample": "skip", "on_long": "skip", "bad_share": 0.5}
    c = talks.config(a, b, batch_size=3, packing=True, row_length=300, window=5, **settings)
    c.data.sets = (c.data.sets[0], dataclasses.replace(c.data.sets[1], repeats=2.0))
    c.seed, c.data.shuffle = 3, shuffle
    data, found = talks.gathered(c)
    estimate = Estimate(c, data, found)
    assert estimate.epoch == pytest.approx(38 + 30)
    batches = OBJECTIVES["answers"].batches(c, talks.tokenizer())
    steps, held = estimate.rows(Fullest(5, 300, 8), 3), 0
    for _ in range(60):
        expected = [
            [int((row == k).sum()) for k in range(1, row.max() + 1)] for row in next(batches).segments
        ]
        assert [[tokens for tokens, _ in row] for row in next(steps)] == expected
        held += sum(map(sum, expected))
    batches.close()
    run = fill(c, data, found)["run"]
    assert (run["row_length"], run["row_tiles"]) == (300, 8)  # 36 positions a picture
    assert run["tokens"] == pytest.approx(held / (60 * 3 * 300), abs=0.03)
    assert run["rows"] == pytest.approx(68 / run["dialogues"], abs=1) and run["steps"] == -(-run["rows"] // 3)
