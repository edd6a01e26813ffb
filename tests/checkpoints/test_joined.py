"""Maps of one input as one, against NumPy; that models answer as before, parity tests say of every family."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

import omnifusion_jax as of
from omnifusion_jax.checkpoints.joined import joined
from omnifusion_jax.checkpoints.load import load_checkpoint
from omnifusion_jax.checkpoints.storage.lazy_array import lazy
from omnifusion_jax.models.answering import answering
from omnifusion_jax.nn import nnx

LAYERS = "decoder/layers/"
SIDES = {  # the map: those that it is made of, which of them has the dimension that they lie along already
    "attention": (("query", "key", "value"), "query"),
    "feed_forward": (("gate", "up"), None),
}


def config():
    c = tiny.looking("one encoder")
    c.decoder.qkv_bias, c.decoder.family, c.decoder.layers = True, "qwen2", 2
    return c


@pytest.fixture(scope="module")
def values():
    """Parameters by path; two of three maps of attention, and one of the others, have factors."""
    found, rng = tiny.arrays(config()), np.random.default_rng(3)
    for name, rank in (("attention/query", 2), ("attention/value", 3), ("feed_forward/up", 2)):
        kernel = found[f"{LAYERS}{name}/kernel"]
        found[f"{LAYERS}{name}/lora_a"] = rng.normal(size=(*kernel.shape[:2], rank)).astype(np.float32)
        found[f"{LAYERS}{name}/lora_b"] = rng.normal(size=(len(kernel), rank, *kernel.shape[2:])).astype(
            np.float32
        )
    return found


def side_by_side(values, part, key):
    names, wide = SIDES[part]
    arrays = {name: values[f"{LAYERS}{part}/{name}/{key}"] for name in names}
    return np.concatenate([a if name == wide else a[..., None, :] for name, a in arrays.items()], -2)


def test_arrays_lie_side_by_side_and_are_read_in_pieces(values):
    found = joined(config(), {path: lazy(a) for path, a in values.items()})
    assert not {path for path in found if path.startswith(LAYERS) and ("/query/" in path or "/gate/" in path)}
    for path, whole in {
        f"{LAYERS}attention/joined/kernel": side_by_side(values, "attention", "kernel"),
        f"{LAYERS}attention/joined/bias": side_by_side(values, "attention", "bias"),
        f"{LAYERS}feed_forward/joined/kernel": side_by_side(values, "feed_forward", "kernel"),
    }.items():
        assert_array_equal(np.asarray(found[path]), whole)
        for start in range(whole.shape[-2]):  # across every border between two maps
            piece = (slice(1, 2), ..., slice(start, start + 2), slice(1, 5))
            assert_array_equal(found[path][piece], whole[piece])
    assert sum(a.nbytes for path, a in found.items() if "lora" not in path) == sum(
        a.nbytes for path, a in values.items() if "lora" not in path
    )


def test_the_joined_map_gives_what_the_maps_gave(values):
    module = answering(config(), joined(config(), {p: lazy(a) for p, a in values.items()}), "float32")
    layer = module.decoder.layers[1]
    x = np.random.default_rng(4).normal(size=(2, 3, config().decoder.width)).astype(np.float32)

    def by_hand(name):
        given = {key: values.get(f"{LAYERS}{name}/{key}") for key in ("kernel", "bias", "lora_a", "lora_b")}
        kernel, bias, a, b = (None if a is None else a[1] for a in given.values())
        y = np.tensordot(x, kernel if a is None else kernel + np.tensordot(a, b, 1), 1)
        return y if bias is None else y + bias

    projections = layer.attention.projections(jnp.asarray(x), None, None)
    for y, name in zip(projections, SIDES["attention"][0], strict=True):
        assert_allclose(y, by_hand(f"attention/{name}"), rtol=1e-4, atol=1e-4)
    gate, up = by_hand("feed_forward/gate"), by_hand("feed_forward/up")
    expected = gate / (1 + np.exp(-gate)) * up
    assert_allclose(layer.feed_forward.hidden(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_maps_that_are_not_kept_alike_stay_apart(values):
    arrays = {path: lazy(a) for path, a in values.items()}
    arrays[f"{LAYERS}attention/key/kernel"] = arrays[f"{LAYERS}attention/key/kernel"].astype(np.float16)
    del arrays[f"{LAYERS}feed_forward/gate/kernel"]
    assert joined(config(), arrays).keys() == arrays.keys()


@pytest.mark.parametrize("weights", ["plain", "int8"])
def test_a_loaded_model_has_them_and_checkpoints_do_not(weights):
    held = nnx.parameters(of.load("omnifusion-tiny", weights=weights).module)
    read = load_checkpoint("omnifusion-tiny", weights=weights, dtype="float32").arrays
    there = {path for path in held if path.startswith(f"{LAYERS}0/") and "/joined/" in path}
    assert len(there) == {"plain": 2, "int8": 4}[weights]
    assert not [path for path in held if path.startswith(LAYERS) and ("/key/" in path or "/up/" in path)]
    assert not [path for path in read if "/joined/" in path]
    assert sum(a.nbytes for a in held.values()) == sum(a.nbytes for a in read.values())
