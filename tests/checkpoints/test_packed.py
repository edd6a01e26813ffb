"""Directories of GPTQ and AWQ, packed here number by number: the formula's values, transformers' logits."""

import json
import re
import shutil

import llava_models
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.torch import load_file, save_file

import omnifusion_jax as of
from omnifusion_jax.checkpoints import integers
from omnifusion_jax.checkpoints.convert import convert
from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder
from omnifusion_jax.errors import CheckpointError
from omnifusion_jax.nn import nnx

MAPS = re.compile(r"(?:model\.)?language_model\..*layers\.\d+\..*(?:_proj)\.weight")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
CASES = {
    "gptq": GPTQ | {"sym": True},
    "gptq, inputs in order of their weight": GPTQ | {"desc_act": True},
    "gptq_v2": GPTQ | {"checkpoint_format": "gptq_v2", "group_size": -1},
    "gptq, 8 bits": GPTQ | {"bits": 8, "group_size": -1, "sym": True},
    "gptq, 8 bits, a zero for each output": GPTQ | {"bits": 8, "group_size": -1},
    "gptq, 8 bits, in order": GPTQ | {"bits": 8, "desc_act": True},
    "awq": AWQ,
}
LOGITS = ("gptq, inputs in order of their weight", "gptq, 8 bits, a zero for each output", "awq")


def word(numbers, bits):
    """int32 of numbers, the first in the lowest bits."""
    return np.uint32(sum(int(n) << bits * i for i, n in enumerate(numbers))).view(np.int32)


def drawn(outs, ins, how, seed):
    """({part: array}, the weight float32[out, in] by the formula)"""
    rng, bits = np.random.default_rng(seed), how["bits"]
    group, n = ins if how["group_size"] == -1 else how["group_size"], 32 // bits
    q = rng.integers(0, 1 << bits, (ins, outs))
    scales = (rng.uniform(0.5, 1, (ins // group, outs)) * 0.6 / (1 << bits)).astype(np.float16)
    v1 = how["quant_method"] == "gptq" and how.get("checkpoint_format") != "gptq_v2"
    zeros = rng.integers(v1, 1 << bits, scales.shape)
    if how.get("sym"):
        zeros[:] = 1 << bits - 1
    g_idx = np.arange(ins) // group
    if how.get("desc_act"):
        g_idx = rng.permutation(g_idx)
    weight = (q - zeros[g_idx]).astype(np.float32) * scales[g_idx].astype(np.float32)
    if how["quant_method"] == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        across = lambda a: [[word([row[j + k] for k in order], 4) for j in range(0, outs, 8)] for row in a]
        parts = {"qweight": across(q), "qzeros": across(zeros)}
    else:
        stored = zeros - v1
        parts = {
            "qweight": [[word(q[r : r + n, o], bits) for o in range(outs)] for r in range(0, ins, n)],
            "qzeros": [[word(row[j : j + n], bits) for j in range(0, outs, n)] for row in stored],
            "g_idx": g_idx.astype(np.int32),
        }
    return {name: np.array(a) for name, a in parts.items()} | {"scales": scales}, weight.T


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A LLaVA of transformers and its directory."""
    directory = tmp_path_factory.mktemp("plain") / "llava"
    return *llava_models.build(directory, decoder="mistral"), directory


@pytest.fixture(scope="module", params=CASES)
def case(request, plain, tmp_path_factory):
    """(name, directory, {name of a tensor: its weight by the formula})"""
    how = CASES[request.param]
    directory = tmp_path_factory.mktemp("packed") / "llava"
    shutil.copytree(plain[2], directory)
    tensors, weights = load_file(directory / "model.safetensors"), {}
    for seed, name in enumerate(filter(MAPS.fullmatch, sorted(tensors))):
        # inputs of the first layer stand in order all the same: each layer has its own
        own = how | {"desc_act": how.get("desc_act") and "layers.0." not in name}
        parts, weights[name] = drawn(*tensors.pop(name).shape, own, seed)
        for part, a in parts.items():
            tensors[name.replace("weight", part)] = torch.from_numpy(np.ascontiguousarray(a))
    assert len(weights) == 7 * llava_models.C.decoder.layers
    first = next(iter(weights))
    tensors[first.replace("weight", "bias")] = torch.zeros(len(weights[first]), dtype=torch.float16)
    save_file(tensors, directory / "model.safetensors")
    change(directory, quantization_config=how)
    return request.param, directory, weights


def change(directory, **values):
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def by_path(arrays, name):
    """The layer of our kernel that a tensor becomes, [in, out]."""
    layer, part = re.search(r"layers\.(\d+)\..*\.(\w+)_proj", name).groups()
    ours = {"q": "attention/query", "k": "attention/key", "v": "attention/value", "o": "attention/out"}
    path = f"decoder/layers/{ours.get(part, f'feed_forward/{part}')}/kernel"
    return np.asarray(arrays[path][int(layer)])


def test_values_are_those_of_the_formula(case):
    name, directory, weights = case
    arrays = load_checkpoint(directory).arrays
    assert integers.kind(arrays) == f"int{CASES[name]['bits']}"
    found = integers.plain(arrays, np.float32)
    for name, weight in weights.items():
        assert_array_equal(by_path(found, name).reshape(weight.T.shape), weight.T, err_msg=name)


def test_logits_are_those_of_transformers_with_the_values(case, plain):
    name, directory, weights = case
    if name not in LOGITS:
        pytest.skip("other cases differ in what the values test reads")
    model, processor, _ = plain
    names = {key.split("language_model.")[1].removeprefix("model."): w for key, w in weights.items()}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            inner = key.split("language_model.")[-1]
            if inner in names and "vision" not in key:
                parameter.copy_(torch.from_numpy(names.pop(inner)))
    assert not names
    request = llava_models.requests()[0]
    text = processor.apply_chat_template(llava_models.messages(request), add_generation_prompt=True)
    with torch.no_grad():
        expected = model(**processor(text=text, images=request.images, return_tensors="pt")).logits[0].numpy()
    [found] = of.load(directory).logits([request])
    assert_allclose(found, expected, rtol=0, atol=5e-4 * np.abs(expected).max())


def test_a_native_directory_keeps_them(case, tmp_path):
    name, directory, _ = case
    if name != "gptq, 8 bits, in order":
        pytest.skip("one with all that stands beside a kernel is enough")
    convert(directory, tmp_path / "native")
    expected, found = load_checkpoint(directory).arrays, load_checkpoint(tmp_path / "native").arrays
    assert found.keys() == expected.keys() and any(path.endswith("_order") for path in found)
    for path, a in found.items():
        assert a.dtype == expected[path].dtype
        assert_array_equal(np.asarray(a), np.asarray(expected[path]), err_msg=path)
    kept = nnx.parameters(of.load(tmp_path / "native").module)
    assert kept["decoder/layers/0/feed_forward/down/kernel_order"].dtype == np.int32


def test_a_decoder_alone(plain, tmp_path):
    """Its tensors have no prefix; AutoGPTQ's own file says how they are packed. The head becomes values."""
    torch_model, directory = plain[0].model.language_model, tmp_path / "decoder"
    torch_model.config.save_pretrained(directory)
    prefix = lambda name: "lm_head.weight" if name == "lm_head.weight" else f"model.{name}"
    tensors = {prefix(name): a for name, a in torch_model.state_dict().items()}
    tensors["lm_head.weight"] = plain[0].lm_head.weight.detach().clone()
    name = "model.layers.0.mlp.down_proj.weight"
    weights = {}
    for seed, key in enumerate([key for key in tensors if key.endswith(("_proj.weight", "lm_head.weight"))]):
        parts, weights[key] = drawn(*tensors.pop(key).shape, GPTQ | {"desc_act": True}, seed)
        for part, a in parts.items():
            tensors[key.replace("weight", part)] = torch.from_numpy(np.ascontiguousarray(a))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    file = directory / "quantize_config.json"
    file.write_text(json.dumps({"bits": 4, "group_size": 16, "desc_act": False, "sym": False}))
    arrays = integers.plain(load_decoder(directory)[1], np.float32)
    assert_array_equal(by_path(arrays, name).reshape(weights[name].T.shape), weights[name].T)
    assert_array_equal(np.asarray(arrays["decoder/head"]), weights["lm_head.weight"].T.astype(np.float16))
    embed = tensors["model.embed_tokens.weight"].numpy()
    assert_array_equal(np.asarray(arrays["decoder/embed"]), embed)


# --- what is refused

WRONG = {
    "bits": ({"bits": 3}, {}, "bits is 3, supported is 4 or 8"),
    "awq of 8 bits": (AWQ | {"bits": 8}, {}, "weights by awq: bits is 8, supported is 4"),
    "awq for another kernel": (AWQ | {"version": "gemv"}, {}, "version is 'gemv'"),
    "marlin": ({"is_marlin_format": True}, {}, "is_marlin_format is True"),
    "bits that vary": ({"dynamic": {"+:.*down.*": {"bits": 8}}}, {}, "dynamic is"),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {},
        r"the weights are quantized \(bitsandbytes, 4 bits\), which is not supported; gptq and awq are",
    ),
    "fp8": ({"quant_method": "fp8"}, {}, r"\(fp8, 4 bits\)"),
    "no group size": ({"group_size": None}, {}, "the settings of gptq lack group_size"),
    "no number of inputs": ({"group_size": 0}, {}, "group_size is 0; it is a number of inputs, or -1"),
    "another group size": ({"group_size": 24}, {}, "is needed"),
    "words of another type": ({}, {"qzeros": 0.5}, "qzeros is float32"),
    "no g_idx": ({}, {"g_idx": None}, "q_proj.g_idx: missing"),
    "an input of no group": ({}, {"g_idx": 99}, "g_idx does not give 16 inputs to each of 3 groups"),
    "a zero that is read in two ways": ({}, {"qzeros": -1}, "a zero is kept as 15"),
    "zeros of another kind": ({"sym": True}, {"qzeros": 0}, "sym is true, but not all zeros are 8"),
    "a bias that a Mistral has not": ({}, {"bias": 0.5}, r"q_proj\.bias -> nowhere: the model has no such"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name, plain, tmp_path):
    settings, parts, said = WRONG[name]
    shutil.copytree(plain[2], tmp_path / "llava")
    tensors = load_file(tmp_path / "llava/model.safetensors")
    for key in [key for key in tensors if MAPS.fullmatch(key) and "q_proj" in key]:
        made, weight = drawn(*tensors.pop(key).shape, GPTQ, 0)
        for part, a in (made | {"bias": np.zeros(len(weight), np.float16)}).items():
            value = parts.get(part, a)
            if isinstance(value, int | float):
                value = np.full(a.shape, value, a.dtype if isinstance(value, int) else np.float32)
            if value is not None:
                tensors[key.replace("weight", part)] = torch.from_numpy(np.ascontiguousarray(value))
    save_file(tensors, tmp_path / "llava/model.safetensors")
    how = {k: v for k, v in (GPTQ | settings).items() if (k, v) != ("group_size", None)}
    change(tmp_path / "llava", quantization_config=how)
    with pytest.raises(CheckpointError, match=said):
        arrays = load_checkpoint(tmp_path / "llava").arrays
        for path in ("kernel", "kernel_scale", "kernel_zero"):
            if f"decoder/layers/attention/query/{path}" in arrays:
                np.asarray(arrays[f"decoder/layers/attention/query/{path}"])


def test_words_that_settings_do_not_announce(plain, tmp_path):
    shutil.copytree(plain[2], tmp_path / "llava")
    change(tmp_path / "llava", quantization_config=GPTQ)
    with pytest.raises(CheckpointError, match="says weights by gptq, but there are 0 tensors"):
        load_checkpoint(tmp_path / "llava")
