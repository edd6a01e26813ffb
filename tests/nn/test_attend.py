"""Who sees whom, drawn by hand, and attention that obeys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omnifusion_jax.errors import ConfigError
from omnifusion_jax.nn import attend as attention
from omnifusion_jax.nn.attend import AttentionSpec, Places, attend

# segments, positions, window, later (None: causal), and for each query the keys that it sees
DRAWN = {
    "causal": ("11111", "01234", None, None, "1.... 11... 111.. 1111. 11111"),
    "two dialogues and a pad": ("11220", "01010", None, None, "1.... 11... ..1.. ..11. ....."),
    "padded on the left": ("00111", "00012", None, None, "..... ..... ..1.. ..11. ..111"),
    "two dialogues of six": ("111122", "012301", None, None, "1..... 11.... 111... 1111.. ....1. ....11"),
    "a window": ("11111", "01234", 2, None, "1.... 11... .11.. ..11. ...11"),
    "a window in each dialogue": ("111222", "012012", 2, None, "1..... 11.... .11... ...1.. ...11. ....11"),
    "a prefix read both ways": ("11111", "01234", None, "00011", "111.. 111.. 111.. 1111. 11111"),
    "all both ways": ("1111", "0123", None, "0000", "1111 1111 1111 1111"),
    "blocks": ("11111", "01234", None, "10101", "11... 11... 1111. 1111. 11111"),
    "causal, said by hand": ("1111", "0123", None, "1111", "1... 11.. 111. 1111"),
    "a prefix in each dialogue": (
        "111222",
        "012012",
        None,
        "001001",
        "11.... 11.... 111... ...11. ...11. ...111",
    ),
    "a prefix and a pad": ("1110", "0120", None, "0010", "11.. 11.. 111. ...."),
    # what lies ahead in one's own block is seen, whatever the window; what lies behind only within it
    "a prefix and a window": ("11111", "01234", 2, "00011", "111.. 111.. .11.. ..11. ...11"),
}


def row(digits):
    return np.array([[int(d) for d in digits]], np.int32)


def spec_of(segments, positions, window, later):
    return AttentionSpec.of(row(segments), row(positions), window, None if later is None else row(later))


def seen(drawing):
    return np.array([[mark == "1" for mark in line] for line in drawing.split()])


@pytest.mark.parametrize("name", DRAWN)
def test_masks(name):
    *what, drawing = DRAWN[name]
    np.testing.assert_array_equal(spec_of(*what).mask(), seen(drawing)[None])


def test_nothing_is_hidden_unless_something_is_said():
    assert AttentionSpec().mask() is None


OBEYED = [None, "two dialogues of six", "a window in each dialogue", "a prefix in each dialogue"]


@pytest.mark.parametrize("block, blocks", [(256, 8), (2, 8), (4, 8), (1, 2)])
@pytest.mark.parametrize("name", OBEYED)
def test_attention_obeys(name, block, blocks, monkeypatch):
    """Grouped queries, each head and row by itself in NumPy, over the keys that are seen and no others.

    All at once, or a few at a time, of which the last may be fewer.
    """
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "BLOCKS", blocks)
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=shape).astype(np.float32) for shape in ((1, 2, 3, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8))
    )
    *what, drawing = DRAWN[name] if name else (" ".join(["111111"] * 6),)
    y = attend(q, k, v, spec_of(*what) if what else AttentionSpec())
    for head, group, i in np.ndindex(2, 3, 6):
        keys = seen(drawing)[i]
        weights = np.exp(k[0, head, keys] @ q[0, head, group, i] / 8**0.5)
        np.testing.assert_allclose(
            y[0, head, group, i], weights @ v[0, head, keys] / weights.sum(), atol=1e-5
        )


def test_later_keys_are_seen_where_queries_are_of_other_places(monkeypatch):
    """Four queries after two keys of a cache: the n-th sees n + 2 keys, though it is one of a block."""
    monkeypatch.setattr(attention, "BLOCK", 2)
    q, k, v = jnp.zeros((1, 1, 1, 4, 2)), jnp.zeros((1, 1, 6, 2)), jnp.eye(6)[None, None]
    query, key = Places(row("1111"), row("2345")), Places(row("111111"), row("012345"))
    y = attend(q, k, v, AttentionSpec(query, key))[0, 0, 0]
    np.testing.assert_allclose(y, np.tril(np.ones((4, 6)), 2) / np.arange(3, 7)[:, None], rtol=1e-6)


def test_a_row_of_padding_gives_numbers_and_no_gradient_that_is_none():
    """A query that sees nothing would make NaN of minus infinity, and 0 * NaN reaches everything."""
    rng = np.random.default_rng(1)
    q, k, v = (
        rng.normal(size=shape).astype(np.float32) for shape in ((1, 1, 1, 5, 4), (1, 1, 5, 4), (1, 1, 5, 4))
    )
    spec = spec_of(*DRAWN["two dialogues and a pad"][:4])
    found = jax.grad(lambda *qkv: (attend(*qkv, spec)[..., :4, :] ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    assert all(np.isfinite(a).all() for a in found)


def test_an_unknown_kernel_is_refused():
    a = jnp.zeros((1, 1, 1, 2, 4))
    with pytest.raises(ConfigError, match="there is no attention kernel 'flush'; choose from dense"):
        attend(a, a[0], a[0], AttentionSpec(kernel="flush"))
