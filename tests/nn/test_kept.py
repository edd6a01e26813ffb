"""Keys and values in 8 bits."""

import jax
import jax.numpy as jnp
import numpy as np

from omnifusion_jax.nn.kept import Rounded, dtype_of, kept, nothing, seen


def test_eight_bits_are_off_by_half_a_step_at_most():
    a = np.random.default_rng(0).normal(size=(2, 3, 5, 16)).astype(np.float32)
    a *= 10.0 ** np.arange(-2, 3)[:, None]  # every position has a scale of its own
    a[0, 0, 0] = 0
    found = kept(jnp.asarray(a), "int8")
    empty = jax.tree.map(jnp.zeros_like, found)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, nothing(a.shape, "int8"), empty))
    step = np.abs(a).max(-1, keepdims=True) / 127
    assert isinstance(found, Rounded) and found.values.dtype == jnp.int8 and dtype_of([found]) == jnp.int8
    assert (np.abs(seen(found, jnp.float32) - a) <= 0.5001 * step).all()
    assert np.abs(found.values).max(-1)[np.abs(a).max(-1) > 0].min() == 127


def test_other_dtypes_are_kept_as_they_are_and_what_is_no_number_stays_none():
    a = jnp.asarray([[[[1.0, -3.0]]]])
    assert (
        kept(a, jnp.bfloat16).dtype == jnp.bfloat16 and (seen(kept(a, jnp.float32), jnp.float32) == a).all()
    )
    assert np.isnan(seen(kept(a.at[0, 0, 0, 0].set(jnp.nan), "int8"), jnp.float32)).all()
