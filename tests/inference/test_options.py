"""A GenerationConfig as data of rows."""

import types
from pathlib import Path

import numpy as np
import pytest

from omnifusion_jax.config import GenerationConfig
from omnifusion_jax.data.tokenizer import Tokenizer
from omnifusion_jax.errors import ConfigError
from omnifusion_jax.inference import options

VOCAB, EOS = 8, 2
WORDS = {"\n": [4, 5], ":": [6], "</s>": [EOS], "": [], "x": [9]}
TOKENIZER = types.SimpleNamespace(eos=EOS, pad=0, encode=WORDS.__getitem__)


def test_the_official_recipe_bans_what_the_tokenizer_says():
    g = GenerationConfig.official()
    assert options.bans(g, TOKENIZER, VOCAB) == [(4, 5), (6,), (5,)]
    found = options.options(g, TOKENIZER, options.Sizes(VOCAB, 64, beams=3))
    assert found.bans[0, :4].tolist() == [[-1, -1, 4, 5], [-1, -1, -1, 6], [-1, -1, -1, 5], [-1] * 4]
    assert found.last.tolist() == [EOS] * 3 and found.ngram[0] == 4
    assert found.beams.tolist() == [3] * 3 and found.rank.tolist() == [0, 1, 2]
    drawn = GenerationConfig(temperature=1.0, num_return_sequences=3)
    assert options.options(drawn, TOKENIZER, options.Sizes(VOCAB, 128)).rank.tolist() == [0, 0, 0]  # alone


@pytest.mark.parametrize(
    ("g", "says"),
    [
        ({"banned": ("",)}, "no token"),
        ({"banned": ("x",)}, "0 to 7"),
        ({"banned_tokens": ((3, 8),)}, "0 to 7"),
        ({"banned_tokens": ((),)}, "no token"),
        ({"stop_token_ids": (8,)}, r"stop_token_ids.*\[8\].*0 to 7"),
        ({"suppress_tokens": (-1,)}, "suppress_tokens.*0 to 7"),
        ({"begin_suppress_tokens": (3, 99)}, "begin_suppress_tokens.*0 to 7"),
        ({"forced_bos_token_id": 8}, "forced_bos_token_id.*0 to 7"),
        ({"forced_eos_token_id": 8}, "forced_eos_token_id.*0 to 7"),
    ],
)
def test_a_token_that_is_none(g, says):
    with pytest.raises(ConfigError, match=says):
        options.needs(GenerationConfig(**g), TOKENIZER, VOCAB)


def test_bans_are_counted_once_and_not_of_ends():
    g = GenerationConfig(banned_tokens=([5], (5,), [3, 4], [6], [EOS]), stop_token_ids=(6, EOS))
    assert options.bans(g, TOKENIZER, VOCAB) == [(5,), (3, 4)]
    assert options.needs(g, TOKENIZER, VOCAB) == options.Sizes(VOCAB, 128, 1, ends=2, bans=2, ban_length=2)


@pytest.mark.parametrize(
    ("g", "says"),
    [
        ({"max_new_tokens": 65}, "room 65, but there is room for 64"),
        ({"num_beams": 2}, "beams 2, but there is room for 1"),
        ({"stop_token_ids": (3, 4)}, "ends 3, but there is room for 2"),
        ({"banned_tokens": tuple((i,) for i in (0, 1, 3, 4, 5))}, "bans 5, but there is room for 4"),
        ({"banned_tokens": ((1, 3, 4, 5, 6),)}, "ban_length 5, but there is room for 4"),
    ],
)
def test_what_does_not_fit_is_refused(g, says):
    sizes = options.Sizes(VOCAB, 64, bans=4)
    with pytest.raises(ConfigError, match=says):
        options.options(GenerationConfig(**{"max_new_tokens": 8, **g}), TOKENIZER, sizes)
    need = options.rounded(options.needs(GenerationConfig(**g), TOKENIZER, VOCAB))
    grown = options.options(GenerationConfig(**g), TOKENIZER, sizes.join(need))
    assert len(grown.limit) == g.get("num_beams", 1)


def test_rows_of_a_table():
    """Rows of a request stand where they were put, side by side or not, and all others ask for nothing."""
    sizes = options.Sizes(VOCAB, 16, beams=2)
    table = options.blank(5, sizes)
    g = GenerationConfig(max_new_tokens=9, num_beams=2, seed=7)
    options.write(table, [1, 3], options.options(g, TOKENIZER, sizes, "name"))
    assert table.limit.tolist() == [0, 9, 0, 9, 0] and table.beams.tolist() == [1, 2, 1, 2, 1]
    assert table.ends[1].tolist() == [EOS, options.NONE] and (table.allowed == options.ALL).all()
    assert len({tuple(row) for row in table.name[[0, 1, 3]].tolist()}) == 3
    for rows, shape in zip(table, options.blank(1, sizes), strict=True):
        assert rows.dtype == shape.dtype and rows.shape[1:] == shape.shape[1:]


def test_names_are_told_apart():
    names = [1, "1", 2, "1#1"]
    assert len({tuple(options.words(name).tolist()) for name in names}) == 4
    assert options.words("a", 1).tolist() != options.words("a").tolist()


def test_why_an_answer_ended():
    g = GenerationConfig(max_new_tokens=4, stop_token_ids=(6,))
    forced = GenerationConfig(max_new_tokens=4, forced_eos=True)
    told = [options.reason(g, TOKENIZER, tokens) for tokens in ([1, EOS], [1, 6], [1, 1, 1, 1], [1, 1, 1, 6])]
    assert told == ["stop", "stop", "length", "stop"]
    assert [options.reason(forced, TOKENIZER, [1] * n + [EOS]) for n in (2, 3)] == ["stop", "length"]


REAL = Path(__file__).parents[3] / "shared/data/omnifusion_1_1"


@pytest.mark.skipif(not REAL.is_dir(), reason="the published tokenizer lies beside the repository only")
def test_the_official_recipe_with_the_published_tokenizer():
    tokenizer, g = Tokenizer(REAL), GenerationConfig.official()
    assert set(options.bans(g, tokenizer, 32000)) == {(28705, 13), (714,), (13,)}
    found = options.options(g, tokenizer, options.Sizes(32000, 64, beams=3))
    assert found.ends[0].tolist() == [2, -1] and np.array_equal(found.suppressed, np.zeros((3, 1000)))
