"""What an encoder keeps for its backward pass is what it is told to."""

import jax
import numpy as np
import pytest
import tiny

from omnifusion_jax.config import ImageConfig, adapter
from omnifusion_jax.models.omnifusion import Stream
from omnifusion_jax.nn import nnx


@pytest.mark.parametrize(("kind", "encoders"), [("linear", 1), ("resampler", 1), ("concat", 2), ("sum", 2)])
def test_every_adapter_tells_its_encoders(kind, encoders):
    (c,) = tiny.config().image.encoders
    c = ImageConfig(encoders=(c,) * encoders, adapter=adapter(kind))
    stream = nnx.eval_shape(lambda: Stream(c, 32, rngs=nnx.Rngs(0)))
    side = c.encoders[0].image_size
    media = (np.zeros((1, 1, side, side, 3), np.uint8),)
    program = lambda remat: str(jax.make_jaxpr(lambda stream: stream(media, remat=remat))(stream))
    assert "remat" in program("full") and "remat" not in program("none")
