"""Products with integers whose outputs have one scale each, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from omnifusion_jax.nn import quantized

SHAPES = {  # of codes, with the dimensions that are summed over
    "heads": ((64, 2, 16), (0,)),
    "from heads": ((2, 16, 64), (0, 1)),
    "head": ((64, 48), (0,)),
    "table": ((48, 64), (1,)),
}


def drawn(shape, axes):
    """(codes, scales, the values that they stand for in float64)"""
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, shape).astype(np.int8)
    outs = [1 if axis in axes else n for axis, n in enumerate(shape)]
    scales = jnp.asarray(rng.uniform(0.5, 2, outs), jnp.bfloat16)
    return codes, scales, codes * np.asarray(scales, np.float64)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_a_product_by_output_is_that_with_the_values(name, rows):
    shape, axes = SHAPES[name]
    codes, scales, values = drawn(shape, axes)
    x = np.random.default_rng(1).normal(size=(2, rows, *(shape[axis] for axis in axes))).astype(np.float32)
    y = jax.jit(quantized.product_by_output, static_argnums=3)(x, codes, scales, axes)
    expected = np.tensordot(x.astype(np.float64), values, (range(2, x.ndim), axes))
    assert y.dtype == np.float32
    assert_allclose(y, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_row_that_is_no_number_stays_none_and_leaves_the_others():
    codes, scales, values = drawn(*SHAPES["table"])
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1] = np.nan, 0
    y = quantized.product_by_output(x, codes, scales, (1,))
    assert np.isnan(y[0]).all() and not np.asarray(y[1]).any()
    assert_allclose(y[2], values.sum(1), rtol=0, atol=1e-4 * np.abs(values.sum(1)).max())


@pytest.mark.parametrize("name", ["head", "table"])
def test_no_loop_is_given_a_wider_copy_of_the_integers(name):
    """XLA computes before a loop what stays the same in it: of a table transposed first, int32."""
    axes = SHAPES[name][1]
    shape = (512, 1024) if axes == (0,) else (1024, 512)
    codes, scales, _ = drawn(shape, axes)

    def steps(x, codes, scales):
        step = lambda i, x: jnp.tanh(quantized.product_by_output(x, codes, scales, axes)[:, :512])
        return jax.lax.fori_loop(0, 4, step, x)

    program = jax.jit(steps).lower(jnp.ones((1, 512)), codes, scales).compile()
    assert program.memory_analysis().temp_size_in_bytes < codes.nbytes
