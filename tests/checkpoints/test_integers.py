"""Kernels of integers in checkpoints: made as a model is loaded, written and read, spread over devices."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

import omnifusion_jax as of
from omnifusion_jax.checkpoints import integers
from omnifusion_jax.checkpoints.convert import convert
from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder, load_trained
from omnifusion_jax.checkpoints.native import open_native, save_native
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.nn import nnx
from omnifusion_jax.sharding import make_mesh

OUT, UP = "decoder/layers/attention/out/kernel", "decoder/layers/feed_forward/up/kernel"
LEVELS = {"int8": 127, "int4": 7}


def config():
    c = tiny.looking("one encoder")
    c.decoder.layers, c.decoder.width, c.decoder.mlp = 2, 128, 192
    return c


@pytest.fixture(scope="module")
def values():
    return {path: a.astype(ml_dtypes.bfloat16) for path, a in tiny.arrays(config()).items()}


@pytest.fixture(scope="module")
def source(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = tiny.make_tokenizer(folder / "tokenizer").directory
    save_native(folder / "model", config(), values, tokenizer)
    return folder / "model"


@pytest.fixture(scope="module", params=LEVELS)
def stored(request, source, tmp_path_factory):
    """(kind, directory that `convert` wrote)"""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    convert(source, folder, weights=request.param)
    return request.param, folder


def by_hand(kernel, kind):
    """The values of integers for a kernel [layers, ins, outs]: a scale for an output, or for 64 inputs."""
    layers, n, m = kernel.shape
    blocks = kernel.astype(np.float32).reshape(layers, -1, n if kind == "int8" else 64, m)
    scale = np.abs(blocks).max(2, keepdims=True) / LEVELS[kind]
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    return (np.clip(np.round(blocks / scale), -LEVELS[kind], LEVELS[kind]) * scale).reshape(kernel.shape)


def ask(model):
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    return model.logits(of.Request([{"role": "user", "content": "What is it?"}], [picture]))[0]


def test_what_is_written_is_what_loading_makes(stored, source, values):
    kind, folder = stored
    assert json.loads((folder / "config.json").read_text())["weights"] == kind
    _, found = open_native(folder)
    kernels = [path for path in found if path.endswith("kernel_scale")]
    assert len(kernels) == 7 and integers.kind(found) == kind
    assert found[UP].nbytes == values[UP].size * {"int8": 1, "int4": 0.5}[kind]
    assert_allclose(np.asarray(integers.plain(found, "float32")[UP]), by_hand(values[UP], kind), rtol=1e-6)
    made = load_checkpoint(source, weights=kind).arrays
    for path, a in load_checkpoint(folder).arrays.items():
        assert a.dtype == made[path].dtype
        assert_array_equal(np.asarray(a), np.asarray(made[path]), err_msg=path)
    for path in set(values) - set(integers.shapes(found)):
        assert_array_equal(np.asarray(found[path]), values[path], err_msg=path)


def test_a_piece_is_that_of_the_whole(stored, source):
    kind, folder = stored
    for arrays in (load_checkpoint(source, weights=kind).arrays, integers.plain(open_native(folder)[1])):
        for path in (OUT, UP):
            piece = (slice(1, 2), *(slice(n // 3, n // 2 + 1) for n in arrays[path].shape[1:]))
            assert_array_equal(arrays[path][piece], np.asarray(arrays[path])[piece], err_msg=path)


def test_a_model_of_integers_computes_with_their_values(stored, source):
    """Two ways to the same logits: `plain` is a model of floats."""
    kind, folder = stored
    model, floats = of.load(folder), of.load(folder, weights="plain")
    assert {a.dtype for p, a in nnx.parameters(model.module).items() if p.endswith("up/kernel")} == {
        {"int8": np.int8, "int4": np.uint8}[kind]
    }
    assert not any(path.endswith("_scale") for path in nnx.parameters(floats.module))
    expected = ask(floats)
    assert_allclose(ask(model), expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    assert_array_equal(ask(of.load(source, weights=kind)), ask(model))
    plain = ask(of.load(source))
    assert np.abs(plain - expected).max() > 1e-3 * np.abs(plain).max()  # something was rounded


def test_a_mesh_holds_pieces_and_answers_alike(stored, source):
    kind, folder = stored
    spread = of.load(source, weights=kind, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    up = nnx.parameters(spread.module)["decoder/layers/1/feed_forward/up/kernel"]
    assert up.addressable_shards[0].data.nbytes == up.nbytes // 4
    expected = ask(of.load(folder))
    assert_allclose(ask(spread), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_training_takes_the_values(stored):
    _, folder = stored
    expected = np.asarray(load_checkpoint(folder, weights="plain").arrays[UP])
    for arrays in (load_trained(folder, config())[1], integers.plain(load_decoder(folder)[1])):
        assert integers.kind(arrays) is None and arrays[UP].dtype == ml_dtypes.bfloat16
        assert_array_equal(np.asarray(arrays[UP]), expected)


def test_other_formats_hold_values(stored, tmp_path):
    kind, folder = stored
    with pytest.raises(ConfigError, match=f"kernels of the decoder are {kind}.* --weights=plain"):
        convert(folder, tmp_path / "refused", "omnifusion")
    assert not (tmp_path / "refused").exists()


def test_a_word_that_contradicts_the_arrays(stored, tmp_path):
    kind, folder = stored
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model/config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "weights"}))
    with pytest.raises(CheckpointError, match=f"weights is None, but kernels in arrays/ are {kind}"):
        open_native(tmp_path / "model")


def test_scales_that_do_not_fit(stored, tmp_path):
    c, arrays = open_native(stored[1])
    wrong = {f"{UP}_scale": np.ones((2, 5, 192), ml_dtypes.bfloat16)}
    with pytest.raises(CheckpointError, match=f"{UP}_scale: the model has no such array"):
        save_native(tmp_path / "model", c, {**arrays, **wrong})


def test_an_unknown_kind_is_refused(source):
    with pytest.raises(ConfigError, match="weights is 'int2'; choose from plain, int8, int4"):
        of.load(source, weights="int2")
