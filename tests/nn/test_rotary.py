"""Rotary positions: whose they are, and where and in which types their angles are computed."""

import re

import jax
import numpy as np
import pytest
import tiny

from omnifusion_jax.config import EncoderConfig
from omnifusion_jax.models.decoder import Decoder
from omnifusion_jax.models.vit import VisionTransformer
from omnifusion_jax.nn import nnx
from omnifusion_jax.nn.attend import AttentionSpec, Places
from omnifusion_jax.nn.rotary import frequencies, over_text

TOWER = EncoderConfig(image_size=18, patch=6, width=16, layers=3, heads=2, mlp=16, rope_theta=100.0)
MAKE = {
    "text": lambda rngs: Decoder(tiny.config().decoder, rngs=rngs),
    "patches": lambda rngs: VisionTransformer(TOWER, rngs=rngs),
}


def text(decoder):
    places = Places(np.ones((2, 5), np.int32), np.tile(np.arange(5), (2, 1)))
    return decoder(np.zeros((2, 5, 48), decoder.dtype), AttentionSpec(places))[0]


def patches(tower):
    return tower(np.zeros((1, 18, 18, 3), np.uint8))[0]


def typed(name, dtype):
    """A model whose parameters are shapes of a type, but for the table of embeddings: it stays float32."""
    empty = nnx.eval_shape(lambda: MAKE[name](nnx.Rngs(0)))
    shaped = lambda path, a: jax.ShapeDtypeStruct(a.shape, a.dtype if path == "embed" else dtype)
    return nnx.with_parameters(empty, {path: shaped(path, a) for path, a in nnx.parameters(empty).items()})


@pytest.mark.parametrize("f", [text, patches])
def test_angles_are_computed_once_for_all_layers(f):
    program = jax.make_jaxpr(f)(typed(f.__name__, "float32"))
    (layers,) = [e.params["jaxpr"] for e in program.eqns if e.primitive.name == "scan"]
    assert str(program).count(" = cos ") == 1 and " = cos " not in str(layers)


@pytest.mark.parametrize("f, half", [(text, "5,8"), (patches, "9,4")])  # of a head's channels
def test_queries_and_keys_keep_their_type(f, half):
    """Were cosines float32, the products of queries and keys would be too, at the cost of their speed."""
    program = str(jax.make_jaxpr(f)(typed(f.__name__, "bfloat16")))
    assert set(re.findall(rf"(\w+)\[\d+,\d[\d,]*,{half}\]", program)) == {"bf16"}


def test_every_row_turns_by_positions_of_its_own():
    """As where a row is several conversations, or starts with padding."""
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 5, 8)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 1, 2]])
    angle = positions[..., None] * 100.0 ** -(np.arange(4) / 4)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)[:, None, None]
    y = over_text(positions, frequencies(4, 100.0), x.dtype)(x)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], axis=-1), rtol=0, atol=1e-5)
