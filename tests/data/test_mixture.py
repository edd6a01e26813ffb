"""Sets of data as one: what an epoch takes from each, in which order, read in which way."""

import collections
import json

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from omnifusion_jax.batch import SPECIAL
from omnifusion_jax.config import DataConfig, SetConfig
from omnifusion_jax.data.mixture import Mixture, open_mixture, prepare_each, shares
from omnifusion_jax.data.order import Order, Share
from omnifusion_jax.data.pipeline import Batches
from omnifusion_jax.errors import ConfigError, DataError
from omnifusion_jax.shipped import load

SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 30)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(sizes=SIZES, seed=st.integers(0, 2**32 - 1), shuffle=st.booleans(), small=st.booleans())
def test_an_epoch_takes_its_samples_and_no_record_comes_twice_before_all_have_come(
    sizes, seed, shuffle, small
):
    """Also with the orders that large sets have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omnifusion_jax.data.order.SMALL", 100 if small else 0)
        order = Order([Share(*size) for size in sizes], seed, shuffle)
    first = np.cumsum([0, *(records for records, _ in sizes)])
    drawn = [order[n] for n in range(4 * len(order))]
    for epoch in range(4):
        here = drawn[epoch * len(order) : (epoch + 1) * len(order)]
        of_set = collections.Counter(np.searchsorted(first, here, side="right") - 1)
        assert of_set == {k: samples for k, (_, samples) in enumerate(sizes)}
    for k, (records, samples) in enumerate(sizes):
        mine = collections.Counter(i for i in drawn if first[k] <= i < first[k + 1])
        whole, rest = divmod(4 * samples, records)
        assert sorted(mine.values()) == sorted(
            [whole] * (records - rest) + [whole + 1] * rest if whole else [1] * rest
        )


def test_orders_of_seeds_sets_and_epochs_differ():
    take = lambda seed, shares, start=0: [Order(shares, seed)[start + n] for n in range(40)]
    half = [Share(80, 40)]
    assert take(1, half) == take(1, half) != take(2, half)
    assert set(take(1, half)) | set(take(1, half, 40)) == set(range(80))
    two = take(1, [Share(40, 40), Share(40, 40)])
    assert sorted(n < 40 for n in two) != [n < 40 for n in two]  # the sets are mixed
    assert take(1, [Share(40, 40)]) != take(1, [Share(40, 40)], 40)
    both = [Order([Share(80, 40), Share(80, 40)], 1)[n] for n in range(80)]
    assert {n for n in both if n < 80} != {n - 80 for n in both if n >= 80}
    large = [Share(1 << 17, 1 << 17)]
    assert take(1, large) == take(1, large) != take(2, large) != take(2, large, 1 << 17)


def test_without_shuffling_sets_follow_one_another():
    order = Order([Share(3, 3), Share(4, 2)], 0, shuffle=False)
    assert [order[n] for n in range(10)] == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6]


# --- from a config


def written(folder, name, count, **more):
    talk = lambda i: [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": "red"}]
    rows = [json.dumps({"id": str(i), "messages": talk(i), **more}) for i in range(count)]
    (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return str(folder / f"{name}.jsonl")


@pytest.fixture
def sets(tmp_path):
    return {name: written(tmp_path, name, n) for name, n in (("a", 10), ("b", 6), ("c", 4))}


def config(sets, *settings, **more):
    found = tuple(
        SetConfig(name=name, path=path, **one)
        for (name, path), one in zip(sets.items(), settings, strict=True)
    )
    return DataConfig(sets=found, max_length=96, **more)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (({}, {}, {}), [10, 6, 4]),
        (({"repeats": 2.0}, {"repeats": 0.5}, {"samples": 9}), [20, 3, 9]),
        (({"weight": 3.0}, {"weight": 1.0}, {"weight": 1.0}), [12, 4, 4]),
        (({"repeats": 0.01}, {}, {}), [1, 6, 4]),
        (({"repeats": 0.36}, {"repeats": 0.4}, {}), [4, 2, 4]),  # 3.6 and 2.4
    ],
)
def test_what_an_epoch_takes(sets, settings, expected):
    c = config(sets, *settings)
    c.validate()
    mixture = open_mixture(c, 6)
    assert [share.samples for share in shares(c, mixture)] == expected
    assert [share.records for share in shares(c, mixture)] == [10, 6, 4]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (({"weight": 1.0}, {}, {}), "only a have a weight"),
        (
            ({"weight": 1.0, "samples": 3}, {"weight": 1.0}, {"weight": 1.0}),
            "more than one of repeats, samples and weight",
        ),
        (({"repeats": 0.0}, {}, {}), "repeats of a is 0"),
        (({"samples": -1}, {}, {}), "samples of a is -1"),
    ],
)
def test_settings_that_mean_nothing(sets, settings, words):
    with pytest.raises(ConfigError, match=words):
        config(sets, *settings).validate()


def test_names_and_the_path(sets):
    with pytest.raises(ConfigError, match=r"need names of their own: \['a', 'a'\]"):
        DataConfig(sets=(SetConfig("a", sets["a"]), SetConfig("a", sets["b"]))).validate()
    with pytest.raises(ConfigError, match=r"data\.path=d\.json and data.sets are both given"):
        DataConfig(path="d.json", sets=(SetConfig("a", sets["a"]),)).validate()
    endless = DataConfig(sets=(SetConfig("a", sets["a"]), SetConfig("s", "synthetic:captions")))
    with pytest.raises(ConfigError, match=r"s has no end\. Give samples"):
        shares(endless, open_mixture(endless, 6))


def test_all_missing_sets_are_named_with_where_they_come_from(sets):
    missing = DataConfig(
        sets=(
            SetConfig("a", sets["a"]),
            SetConfig("b", "gone/b.json", get="example.org/b"),
            SetConfig("c", "gone/c.json"),
        )
    )
    with pytest.raises(DataError) as caught:
        open_mixture(missing, 6)
    told = str(caught.value)
    assert told.startswith("2 of 3 sets of data cannot be read:\n  b: gone/b.json does not exist")
    assert "\n    It comes from example.org/b\n  c: gone/c.json does not exist" in told
    with pytest.raises(DataError, match=r"1 of 1 sets of data cannot be read:\n  b: (.|\n)*example.org/b$"):
        open_mixture(DataConfig(sets=(missing.sets[1],)), 6)


def test_places_and_fingerprints(sets, tmp_path):
    mixture = open_mixture(config(sets, {}, {}, {}), 6)
    assert len(mixture) == 20
    assert [mixture.locate(i) for i in (0, 9, 10, 15, 16, 19)] == [
        (0, 0),
        (0, 9),
        (1, 0),
        (1, 5),
        (2, 0),
        (2, 3),
    ]
    assert mixture.where(16) == f"c: {sets['c']}:1"
    assert mixture[16].number == 2 and mixture[16].dialogue.turns[0] == ("user", "c 0?")
    alone = open_mixture(DataConfig(path=sets["a"]), 6)
    assert alone.where(3) == f"{sets['a']}:4" and alone.fingerprint == alone.sources[0].fingerprint
    two, turned = (
        open_mixture(config({name: sets[name] for name in names}, {}, {}), 6) for names in ("ab", "ba")
    )
    assert len({two.fingerprint, turned.fingerprint, alone.fingerprint, mixture.fingerprint}) == 4
    written(tmp_path, "b", 7)
    assert open_mixture(config(sets, {}, {}, {}), 6).fingerprint != mixture.fingerprint
    assert Mixture({"x": [1, 2]}).fingerprint is None
    assert Mixture({"x": [1, 2], "y": [3, 4]}).where(3) == "y: record 1"


def test_each_set_is_read_in_its_own_way(sets, tokenizer):
    """Vectors of a layout are numbered as the model has them."""
    c = config(sets, {}, {"prompt": "Be brief.\n"}, {"layout": "text"})
    model = tiny.config()
    mixture, prepare = open_mixture(c, 6), prepare_each(c, model, tokenizer)
    plain, brief, words = (prepare(mixture[i]) for i in (0, 10, 16))
    assert tokenizer.decode(brief.tokens[: len(tokenizer.encode("Be brief.\n"))]).strip() == "Be brief."
    assert not np.array_equal(plain.tokens[:4], brief.tokens[:4])
    assert (plain.kind == SPECIAL).sum() == 2 and (words.kind == SPECIAL).sum() == 0
    without = config(sets, {}, {"prompt": ""}, {})
    none = prepare_each(without, model, tokenizer)(mixture[10])
    usual = prepare_each(config(sets, {}, {}, {}), model, tokenizer)(mixture[10])
    assert none.tokens.tolist() == usual.tokens[len(tokenizer.encode(tiny.PROMPT)) :].tolist()
    bare = tiny.config(layout="text")
    with pytest.raises(
        ConfigError, match="layout 'omnifusion' needs vectors that the model does not have: user, bot"
    ):
        prepare_each(config(sets, {}, {}, {"layout": "omnifusion"}), bare, tokenizer)


@pytest.mark.parametrize("on_long", ["raise", "skip", "cut"])
def test_all_sets_are_read_with_the_settings_of_the_data(sets, tokenizer, on_long):
    settings = {"max_pixels": 77, "draft": True, "on_long": on_long}
    for prepare in prepare_each(config(sets, {}, {}, {}, **settings), tiny.config(), tokenizer).each:
        assert (prepare.processors["image"].max_pixels, prepare.processors["image"].draft) == (77, True)
        assert (prepare.layout.max_length, prepare.layout.cut) == (96, on_long == "cut")


def test_batches_of_a_mixture(sets, tokenizer):
    """As many of each set as its share, and the same ones with workers."""
    c = config(sets, {"samples": 2}, {"samples": 5}, {"samples": 1}, check="off")
    mixture, prepare = open_mixture(c, 6), prepare_each(c, tiny.config(), tokenizer)

    def questions(workers):
        batches = Batches(
            mixture,
            prepare,
            shares=shares(c, mixture),
            batch_size=4,
            length=96,
            tiles=prepare.tiles,
            seed=5,
            num_workers=workers,
        )
        rows = [row for _ in range(4) for row in next(batches).tokens]
        batches.close()
        return ["".join(tokenizer.decode(row)).split("?")[0].split()[-2] for row in rows]

    found = questions(0)
    assert [collections.Counter(found[i : i + 8]) for i in (0, 8)] == [{"a": 2, "b": 5, "c": 1}] * 2
    assert found == questions(2)


# --- the report's


@pytest.mark.parametrize(("phase", "total"), [("pretrain", 1_253_000), ("sft", 925_500)])
def test_the_mixtures_of_the_report(phase, total, tmp_path, monkeypatch):
    """They open on files where the config says they are, and take what the report's table says."""
    found = load(f"report/mixture:{phase}").validate()
    with pytest.raises(DataError) as caught:
        open_mixture(found.data, 24)
    assert all(
        f"\n  {one.name}: " in str(caught.value) and one.get in str(caught.value) for one in found.data.sets
    )
    monkeypatch.chdir(tmp_path)
    for one in found.data.sets:
        (tmp_path / one.path).parent.mkdir(parents=True, exist_ok=True)
        talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
        record = (
            {"instruction": "Say", "input": "red", "output": "red"}
            if one.name == "alpaca"
            else {"conversations": talk}
        )
        (tmp_path / one.path).write_text(json.dumps([record] * 3))
    mixture = open_mixture(found.data, 24)
    whole = {"llava-665k": 665_000, "laion-cc-sbu-blip": 558_000}  # taken as they are
    taken = [
        whole.get(one.name, share.samples)
        for one, share in zip(found.data.sets, shares(found.data, mixture), strict=True)
    ]
    assert sum(taken) == total
    assert all(mixture[i].dialogue.turns for i in range(len(mixture)))
    assert found.steps == pytest.approx(total / found.batch_size, rel=0.03)
