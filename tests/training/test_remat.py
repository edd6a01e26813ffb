"""What a backward pass keeps of the layers of an encoder that is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from omnifusion_jax.models.omnifusion import abstract
from omnifusion_jax.nn import nnx


@pytest.mark.parametrize("looks", ["one encoder", "two encoders"])
def test_layers_of_a_trained_encoder_are_computed_again(looks):
    """Of which one layer is read, or all of them: the same gradients, from less memory."""
    c, rng = tiny.looking(looks), np.random.default_rng(0)
    c.image.encoders[0].layers = 12
    tower, rest = {}, {}
    for path, a in tiny.arrays(c).items():
        (tower if "/encoders/" in path else rest)[path] = jnp.asarray(a)
    media = [rng.integers(0, 256, (1, 16, view.size, view.size, 3), np.uint8) for view in c.image.views]

    def loss(tower, remat):
        module = nnx.with_parameters(abstract(c), tower | rest)
        return (module.image(media, remat=remat) ** 2).mean()

    back = jax.jit(jax.grad(loss), static_argnums=1)
    none, full = (back.lower(tower, remat).compile() for remat in ("none", "full"))
    again = full(tower)
    for path, a in none(tower).items():
        np.testing.assert_allclose(again[path], a, rtol=0, atol=1e-5 * np.abs(a).max(), err_msg=path)
    takes = [made.memory_analysis().temp_size_in_bytes for made in (none, full)]
    assert takes[1] < 0.5 * takes[0], takes
