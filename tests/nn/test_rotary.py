"""Where the angles of rotary positions are computed."""

import jax
import numpy as np
import tiny

from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.models.decoder import Decoder
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec, Places


def cosines(f, make):
    """How many a program computes for all layers, and in each of them."""
    program = jax.make_jaxpr(f)(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    (layers,) = [e.params["jaxpr"] for e in program.eqns if e.primitive.name == "scan"]
    inside = str(layers).count(" = cos ")
    return str(program).count(" = cos ") - inside, inside


def test_text_has_them_once_for_all_layers():
    places = Places(np.ones((2, 5), np.int32), np.tile(np.arange(5), (2, 1)))
    x = np.zeros((2, 5, 48), np.float32)
    make = lambda rngs: Decoder(tiny.config().decoder, rngs=rngs)
    assert cosines(lambda decoder: decoder(x, AttentionSpec(places))[0], make) == (1, 0)


def test_patches_have_them_once_for_all_layers():
    c = EncoderConfig(image_size=18, patch=6, width=16, layers=3, heads=2, mlp=16, rope_theta=100.0)
    make = lambda rngs: VisionTransformer(c, rngs=rngs)
    assert cosines(lambda tower: tower(np.zeros((1, 18, 18, 3), np.uint8))[0], make) == (1, 0)
