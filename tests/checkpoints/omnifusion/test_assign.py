"""Adapters of two encoders under invented names, read by shapes, order and hints."""

import json

import numpy as np
import pytest
import tiny

from omnifusion_jax.checkpoints.omnifusion import two_encoders
from omnifusion_jax.config import EncoderConfig, ImageConfig, ModelConfig, adapter
from omnifusion_jax.errors import CheckpointError

CLIP = EncoderConfig(image_size=24, patch=8, width=24, layers=4, heads=2, mlp=40)
PUBLISHED = EncoderConfig(), EncoderConfig(image_size=224)  # of the published sizes


def config(equal=True, **settings):
    second = EncoderConfig(
        image_size=16, patch=8, width=24 if equal else 20, layers=4 if equal else 6, heads=2, mlp=40
    )
    return ModelConfig(
        image=ImageConfig((CLIP, second), adapter("sum", width=16, **settings)), decoder=tiny.config().decoder
    )


def known(c):
    """What is known of a model before its adapter is read."""
    return ModelConfig(image=ImageConfig(c.image.encoders), decoder=c.decoder)


def torch_names(c, arrays, name, form="[out, in]", norm="{}_norm", weights="{}_weights", linear="out"):
    """A file of `arrays` in one of the forms.

    Patterns are given the encoder's name, the layer and the encoder's number.
    """
    tensors = {}
    for i, encoder in enumerate(("clip", "dino")):
        mine = {
            p.removeprefix(f"image/adapter/mixes/{i}/"): a
            for p, a in arrays.items()
            if p.startswith(f"image/adapter/mixes/{i}/")
        }
        kernel = mine["layers/kernel"]
        if form == "[out, in]":
            for n in range(len(kernel)):
                tensors[f"{name.format(encoder, n, i)}.weight"] = kernel[n].T
                if "layers/bias" in mine:
                    tensors[f"{name.format(encoder, n, i)}.bias"] = mine["layers/bias"][n]
        elif form == "[out, layer in]":
            tensors[f"{name.format(encoder, '', i)}.weight"] = np.concatenate([k.T for k in kernel], axis=1)
            tensors[f"{name.format(encoder, '', i)}.bias"] = mine["bias"]
        else:
            tensors[name.format(encoder, "", i)] = (
                kernel if form == "[layer, in, out]" else kernel.swapaxes(1, 2)
            )
            tensors[name.format(encoder, "", i) + "_b"] = mine["layers/bias"]
        shared = "norm/scale" in mine
        for n in (None,) if shared else range(len(kernel)):
            for part, ours in (("weight", "scale"), ("bias", "bias")):
                tensors[f"{norm.format(encoder, n, i)}.{part}"] = (
                    mine[f"norm/{ours}"] if shared else mine[f"layers/norm/{ours}"][n]
                )
        tensors[weights.format(encoder, "", i)] = mine["layers/weight"].reshape(-1, 1)
    return {
        **tensors,
        f"{linear}.weight": arrays["image/adapter/linear/kernel"].T,
        f"{linear}.bias": arrays["image/adapter/linear/bias"],
    }


def read(tensors, c, reading=None):
    """(config found, arrays) of a file, where only encoders and decoder are known."""
    found = known(c)
    tensors = two_encoders.divided(tensors, found)
    reading = reading or two_encoders.choose(tensors, found, "projection.pt")
    found.image.adapter = two_encoders.adapter_config(reading, tensors, found, "projection.pt")
    return found.image.adapter, two_encoders.assigned(reading, tensors, found, "projection.pt")


CASES = {
    "attributes": ({}, {"name": "{0}_map_{1}"}),
    "attributes without bias": ({"bias": "none"}, {"name": "{0}_map_{1}"}),
    "a norm a layer": ({"shared_norm": False}, {"name": "{0}_map_{1}", "norm": "{0}_ln_{1}"}),
    "blocks alone": ({"first_state": 1}, {"name": "{0}_map_{1}"}),
    "lists of modules": ({}, {"name": "maps_{0}.{1}"}),
    "one fused linear": ({"bias": "one"}, {"name": "{0}_all", "form": "[out, layer in]"}),
    "stacked parameters": ({}, {"name": "{0}_stack", "form": "[layer, out, in]"}),
}


@pytest.mark.parametrize("equal", [True, False], ids=["equal widths", "different widths"])
@pytest.mark.parametrize("case", CASES)
def test_names_with_hints_leave_no_choice(case, equal):
    settings, form = CASES[case]
    c = config(equal, **settings)
    arrays = tiny.arrays(c, "image/adapter")
    found, ours = read(torch_names(c, arrays, **form), c)
    assert found == c.image.adapter and ours.keys() == arrays.keys()
    for path, a in arrays.items():
        np.testing.assert_array_equal(ours[path], a, err_msg=path)


@pytest.mark.parametrize("form", ["[layer, out, in]", "[layer, in, out]"])
def test_different_widths_need_no_hints(form):
    c = config(equal=False)
    arrays = tiny.arrays(c, "image/adapter")
    _, ours = read(torch_names(c, arrays, "w{2}", form, norm="n{2}", weights="a{2}"), c)
    np.testing.assert_array_equal(
        ours["image/adapter/mixes/1/layers/kernel"], arrays["image/adapter/mixes/1/layers/kernel"]
    )


def test_where_order_alone_speaks_the_user_decides():
    """The likeliest reading is offered; edited, it is what counts."""
    c = config()
    arrays = tiny.arrays(c, "image/adapter")
    tensors = torch_names(c, arrays, "layers{2}_{1}", norm="n{2}", weights="a{2}")
    with pytest.raises(two_encoders.Ambiguous, match="8 readings fit, the likeliest") as caught:
        read(tensors, c)
    assert "layers0_{0-4}.weight [out, in]" in str(caught.value)
    likeliest = json.loads(json.dumps(caught.value.readings[0]))
    _, ours = read(tensors, c, likeliest)
    np.testing.assert_array_equal(
        ours["image/adapter/mixes/0/layers/kernel"], arrays["image/adapter/mixes/0/layers/kernel"]
    )
    likeliest["image/adapter/mixes/0/layers/weight"], likeliest["image/adapter/mixes/1/layers/weight"] = (
        "a1",
        "a0",
    )
    _, ours = read(tensors, c, likeliest)
    np.testing.assert_array_equal(
        ours["image/adapter/mixes/0/layers/weight"], arrays["image/adapter/mixes/1/layers/weight"]
    )


def test_modules_numbered_through_both_encoders():
    c = config()
    arrays = tiny.arrays(c, "image/adapter")
    tensors = torch_names(c, arrays, "{0}_map_{1}")
    both = {}
    for name, a in tensors.items():
        for i, encoder in enumerate(("clip", "dino")):
            if name.startswith(f"{encoder}_map_"):
                n, _, part = name.removeprefix(f"{encoder}_map_").partition(".")
                name = f"maps.{int(n) + 5 * i}.{part}"
        both[name] = a
    with pytest.raises(
        two_encoders.Ambiguous,
        match=r"2 readings fit, the likeliest:[^$]*mixes/0/layers/kernel +maps\.\{0-4\}\.weight",
    ):
        read(both, c)


def test_a_square_stack_may_be_either_way_round():
    c = config()
    c.image.adapter.width = 24
    arrays = tiny.arrays(c, "image/adapter")
    tensors = torch_names(c, arrays, "{0}_stack", "[layer, in, out]")
    with pytest.raises(two_encoders.Ambiguous) as caught:
        read(tensors, c)
    assert {r["image/adapter/mixes/0/layers/kernel"]["as"] for r in caught.value.readings} == {
        "[layer, out, in]",
        "[layer, in, out]",
    }


@pytest.mark.parametrize("shape", [(2, 5), (10,)])
def test_layer_weights_of_both_encoders_in_one_tensor(shape):
    c = config()
    arrays = tiny.arrays(c, "image/adapter")
    tensors = torch_names(c, arrays, "{0}_map_{1}")
    both = np.concatenate([tensors.pop("clip_weights"), tensors.pop("dino_weights")]).reshape(shape)
    with pytest.raises(
        two_encoders.Ambiguous, match=r"2 readings fit[^$]*mixes/0/layers/weight +alpha\[:5\]"
    ) as caught:
        read({**tensors, "alpha": both}, c)
    _, ours = read({**tensors, "alpha": both}, c, caught.value.readings[0])
    for path, a in arrays.items():
        np.testing.assert_array_equal(ours[path], a, err_msg=path)


@pytest.mark.parametrize("shared", [True, False])
def test_a_norm_a_layer_at_the_published_size(shared):
    """25 layers of each encoder are of equal width, and their names tell nothing.

    That is found without trying every order of them.
    """
    c = ModelConfig(image=ImageConfig(PUBLISHED, adapter("sum", width=1024, shared_norm=shared)))
    arrays = {
        path: np.broadcast_to(np.float16(0), shape)
        for path, shape in two_encoders.shapes_of(c, "image/adapter").items()
    }
    with pytest.raises(two_encoders.Ambiguous):
        read(torch_names(c, arrays, "m{2}_{1}", norm="n{2}" if shared else "n{2}_{1}", weights="a{2}"), c)


def test_the_published_size():
    """With 25 hidden states and a norm of each encoder it has the published file's 56,682,546 parameters."""
    c = ModelConfig(image=ImageConfig(PUBLISHED, adapter("sum")))
    arrays = {
        path: np.broadcast_to(np.float16(0), shape)
        for path, shape in two_encoders.shapes_of(c, "image/adapter").items()
    }
    assert sum(a.size for a in arrays.values()) == 56_682_546
    c.image.adapter.width = 1024
    found, _ = read(torch_names(c, arrays, "{0}_map_{1}"), c)
    assert found == c.image.adapter


BAD = {
    "an unknown tensor": (
        {"image/adapter/linear/kernel": "nowhere"},
        ["nowhere: the adapter's file has no such tensor", "out.weight: not used"],
    ),
    "one used twice": (
        {"image/adapter/linear/bias": "clip_norm.bias"},
        ["clip_norm.bias: used 2 times", "out.bias: not used"],
    ),
    "no form": (
        {"image/adapter/mixes/0/layers/kernel": "clip_map_{0-4}.weight"},
        ["as must be one of [out, in], [out, layer in]"],
    ),
    "no such form": (
        {"image/adapter/mixes/0/norm/bias": {"from": "clip_norm.bias", "as": "[in, out]"}},
        ["image/adapter/mixes/0/norm/bias: only kernels of the layers are given with as"],
    ),
    "a form of what needs none": (
        {"image/adapter/linear/kernel": {"from": "out.weight", "as": "[out, in]"}},
        ["image/adapter/linear/kernel: only kernels of the layers are given with as"],
    ),
    "a form that is none": (
        {"image/adapter/mixes/0/layers/kernel": {"from": "clip_map_{0-4}.weight", "as": []}},
        ["as must be one of [out, in], [out, layer in]"],
    ),
    "an empty run": (
        {"image/adapter/mixes/0/layers/bias": "clip_map_{4-0}.bias"},
        ["image/adapter/mixes/0/layers/bias: the reading names no tensor"],
    ),
    "not a reading": ({"image/adapter/linear/kernel": 5}, ["a reading maps our paths to names"]),
    "swapped shapes": (
        {"image/adapter/linear/bias": "clip_norm.bias", "image/adapter/mixes/0/norm/bias": "out.bias"},
        ["out.bias -> image/adapter/mixes/0/norm/bias"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_assignments(case):
    c = config()
    tensors = torch_names(c, tiny.arrays(c, "image/adapter"), "{0}_map_{1}")
    good = two_encoders.choose(tensors, known(c), "projection.pt")
    changes, words = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        read(tensors, c, {**good, **changes})
    assert all(word in str(caught.value) for word in words), caught.value


def test_what_cannot_be_read_is_listed():
    c = config()
    with pytest.raises(
        CheckpointError, match=r"cannot be read as a projection-and-summation adapter[^$]*mystery \[3, 5\]"
    ):
        read({"mystery": np.zeros((3, 5), np.float32)}, c)


def test_far_too_small_is_as_wrong_as_far_too_large():
    """A reading ranks by how far its embeddings are from those that the decoder knows, whichever way."""
    c = config()
    arrays = tiny.arrays(c, "image/encoders/0", "image/encoders/1", "decoder", "image/adapter")
    views = tuple(
        np.random.default_rng(i).integers(0, 256, (1, view.size, view.size, 3), np.uint8)
        for i, view in enumerate(c.image.views)
    )
    found = {}
    for factor in (1e-6, 1.0, 1e6):
        scaled = {
            path: a * factor if path.startswith("image/adapter/linear") else a for path, a in arrays.items()
        }
        tensors = torch_names(c, scaled, name="{0}_map_{1}")
        known = ModelConfig(image=ImageConfig(c.image.encoders), decoder=c.decoder)
        found[factor] = two_encoders.distance(
            two_encoders.choose(tensors, known, "here"), tensors, known, arrays, views
        )
    assert found[1e-6] > 8 > found[1.0] >= 0 and found[1e6] > 8
