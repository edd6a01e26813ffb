"""Kernels of integers in checkpoints: made as a model is loaded, written and read, spread over devices."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from numpy.testing import assert_allclose, assert_array_equal

import omnifusion_jax as of
from omnifusion_jax.checkpoints import integers
from omnifusion_jax.checkpoints.convert import convert
from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder, load_trained
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.native import open_native, save_native
from omnifusion_jax.checkpoints.storage.lazy_array import lazy
from omnifusion_jax.checkpoints.storage.placement import for_answers
from omnifusion_jax.config import LoraConfig, part_of
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.models.answering import answering
from omnifusion_jax.nn import nnx
from omnifusion_jax.sharding import make_mesh

OUT, UP = "decoder/layers/attention/out/kernel", "decoder/layers/feed_forward/up/kernel"
DOWN = "decoder/layers/feed_forward/down/kernel"
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
    same = np.isclose(np.asarray(integers.plain(found, "float32")[UP]), by_hand(values[UP], kind), rtol=1e-6)
    assert same.mean() > 0.999  # what lies half way between two integers may go either way
    made = load_checkpoint(source, weights=kind).arrays
    for path, a in load_checkpoint(folder).arrays.items():
        assert a.dtype == made[path].dtype
        assert_array_equal(np.asarray(a), np.asarray(made[path]), err_msg=path)
    for path in set(values) - set(integers.shapes(found)):
        assert_array_equal(np.asarray(found[path]), values[path], err_msg=path)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_in_int8_have_a_scale_for_each_token(tied, values):
    c = config()
    c.decoder.tied, c.decoder.embed_scale, c.decoder.logit_scale = tied, 3.0, 0.25  # as MiniCPM multiplies
    embed, head = values["decoder/embed"], np.ascontiguousarray(values["decoder/embed"][::-1].T)
    arrays = {**{path: a for path, a in values.items() if path != "decoder/head"}, "decoder/embed": embed}
    arrays = {path: lazy(a) for path, a in (arrays if tied else {**arrays, "decoder/head": head}).items()}
    found = integers.quantised(c, arrays, "int8", whole=True)
    assert not any(path.startswith("decoder/embed_") for path in integers.quantised(c, arrays, "int4"))
    assert found["decoder/embed"].dtype == np.int8 and ("decoder/head" in found) != tied
    decoder = answering(c, for_answers(found), "float32").decoder
    rows = by_hand(embed.T[None], "int8")[0].T
    tokens = np.array([3, 0, 7])
    assert np.isclose(decoder.embed_tokens(tokens), 3.0 * rows[tokens], rtol=1e-6).mean() > 0.999
    x = np.random.default_rng(1).normal(size=(2, c.decoder.width)).astype(np.float32)
    expected = 0.25 * (x @ (rows.T if tied else by_hand(head[None], "int8")[0]))
    found = jax.jit(lambda decoder, x: decoder.logits(x))(decoder, x)
    near = np.isclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert near.mean() > 0.99  # an integer half way, as above, moves one token's score


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
    held = nnx.parameters(model.module)["decoder/layers/1/feed_forward/down/kernel"]
    assert held.dtype == {"int8": np.int8, "int4": np.uint8}[kind]
    assert not any(path.endswith("_scale") for path in nnx.parameters(floats.module))
    expected = ask(floats)
    assert_allclose(ask(model), expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    assert_array_equal(ask(of.load(source, weights=kind)), ask(model))
    plain = ask(of.load(source))
    assert np.abs(plain - expected).max() > 1e-3 * np.abs(plain).max()  # something was rounded


def test_a_mesh_holds_pieces_and_answers_alike(stored, source):
    kind, folder = stored
    spread = of.load(source, weights=kind, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    held = nnx.parameters(spread.module)
    for name in ("attention/joined", "feed_forward/joined", "feed_forward/down"):
        kernel = held[f"decoder/layers/1/{name}/kernel"]
        assert kernel.addressable_shards[0].data.nbytes == kernel.nbytes // 4
    expected = ask(of.load(folder))
    assert_allclose(ask(spread), expected, rtol=0, atol=5e-4 * np.abs(expected).max())


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


# --- factors beside integers


@pytest.fixture(scope="module")
def factors(tmp_path_factory):
    """What a run left that trained factors over integers of 4 bits: (directory, its arrays)."""
    c, lora = config(), LoraConfig(rank=2, alpha=3.0, base="int4")
    trained = {"lora", "image/adapter", "special"}
    shapes = {p: s for p, s in shapes_of(c, factors=lora).items() if part_of(p) in trained}
    rng = np.random.default_rng(5)
    arrays = {path: (rng.normal(size=shape) * 0.2).astype(np.float32) for path, shape in shapes.items()}
    folder = tmp_path_factory.mktemp("factors") / "model"
    save_native(folder, c, arrays, factors=lora)
    return folder, arrays


def test_factors_stay_beside_integers(factors, source, tmp_path):
    """The integers are those that they were trained over, and the model is the merged one."""
    folder, arrays = factors
    merged, beside = of.load(folder, base=source), of.load(folder, base=source, weights="int4")
    codes = nnx.parameters(beside.module)["decoder/layers/1/feed_forward/down/kernel"]
    blocks = load_checkpoint(source, weights="int4").arrays[DOWN]
    assert codes.dtype == np.uint8
    assert_array_equal(codes, np.asarray(blocks)[1])
    expected = by_hand(np.asarray(load_checkpoint(source).arrays[DOWN]), "int4")
    expected += 1.5 * np.einsum("lir,lro->lio", *(arrays[DOWN.replace("kernel", f"lora_{x}")] for x in "ab"))
    found = nnx.parameters(merged.module)["decoder/layers/1/feed_forward/down/kernel"]
    assert np.isclose(found, expected[1], rtol=0, atol=1e-2).mean() > 0.999
    logits = ask(merged)
    assert_allclose(ask(beside), logits, rtol=0, atol=1e-2 * np.abs(logits).max())


def test_a_directory_keeps_factors_beside_integers(factors, source, tmp_path):
    folder, _ = factors
    checkpoint, _ = convert(folder, tmp_path / "whole", base=source, weights="int4")
    assert checkpoint.factors.rank == 2 and not checkpoint.missing
    read = load_checkpoint(tmp_path / "whole")
    assert read.factors == checkpoint.factors and integers.kind(read.arrays) == "int4"
    asked = ask(of.load(folder, base=source, weights="int4"))
    assert_array_equal(ask(of.load(tmp_path / "whole")), asked)
    convert(tmp_path / "whole", tmp_path / "omnifusion", "native", weights="plain")
    plain = load_checkpoint(tmp_path / "omnifusion")
    assert plain.factors is None and integers.kind(plain.arrays) is None
    assert_allclose(ask(of.load(tmp_path / "omnifusion")), asked, rtol=0, atol=3e-2 * np.abs(asked).max())


# --- memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Directories of a model and of two layers of it; its decoder has 60 MB in int8, 240 in float32."""
    c, folder = config(), tmp_path_factory.mktemp("large")
    c.decoder.width, c.decoder.mlp = 768, 3072

    def drawn(shape):
        bits = np.random.default_rng(0).integers(0, 1 << 16, shape[1:], np.uint16) & 0xBF7F
        return np.broadcast_to(bits.view(ml_dtypes.bfloat16), shape)

    tokenizer = tiny.make_tokenizer(folder / "tokenizer").directory
    for layers in (8, 2):
        c.decoder.layers = layers
        arrays = {path: drawn(shape) for path, shape in shapes_of(c).items()}
        save_native(folder / str(layers), c, arrays, tokenizer)
    return folder / "8", folder / "2"


@pytest.mark.parametrize("devices", ["one", "mesh"])
def test_the_host_holds_a_few_arrays_at_a_time(devices, large):
    command = [sys.executable, Path(__file__).with_name("loads.py"), *large, devices]
    # what is freed is given back at once; else the peak is three to ten arrays more, as threads happen to run
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | allocator
    said = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-4000:]
    grown, kept, largest = map(int, said.stdout.split()[-3:])
    assert kept < 70e6
    assert grown < kept + 3 * largest, f"{grown:,} {kept:,} {largest:,}"
