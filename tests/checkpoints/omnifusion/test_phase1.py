"""What phase 1 of the original code writes: read by training and by the converter, and written."""

import copy
import dataclasses
import json

import models
import numpy as np
import pytest
import tiny
import torch
from conftest import run_command
from settings import changed

import omnifusion_jax as of
from omnifusion_jax.checkpoints.inspect import inspect
from omnifusion_jax.checkpoints.load import load_checkpoint, load_trained
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.omnifusion import two_encoders
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.config import ModelConfig, TrainConfig, adapter, part_of
from omnifusion_jax.errors import CheckpointError, ConfigError
from omnifusion_jax.models.presets import PRESETS, preset
from omnifusion_jax.run import starting_point

C = dataclasses.replace(tiny.config(), layout="original")
NAMES = ("USER", "BOT", "SOI", "EOI")


def write(directory, module, width, names=NAMES):
    """As the original's trainer does at the end of an epoch. Returns the vectors."""
    special = {name: torch.randn(width).to(torch.bfloat16).requires_grad_() for name in names}
    directory.mkdir()
    torch.save(module.to(torch.bfloat16).train(), directory / "projection.pt")
    torch.save(special, directory / "special_embeddings.pt")
    return special


@pytest.fixture
def source(tmp_path):
    """The directory, the PyTorch module in it, and the vectors."""
    module = models.VisualToGPTMapping(32, 48, 9, 2, 48)
    return tmp_path / "version_0", module, write(tmp_path / "version_0", module, 48)


def bits(a):
    if isinstance(a, torch.Tensor):
        return a.detach().view(torch.int16).numpy()
    return np.ascontiguousarray(np.asarray(a)).view(np.int16)


def holds(arrays, module, special):
    """Arrays of ours that PyTorch's transposing and slicing find in the files; the path of every tensor."""
    layer, linear = module.transformer_layer, module.linear
    queries, keys, values = layer.self_attn.in_proj_weight.detach().chunk(3)
    for path, theirs in {
        "image/adapter/linear/kernel": linear.weight.T,
        "image/adapter/linear/bias": linear.bias,
        "image/adapter/layer/feed_forward/up/kernel": layer.linear1.weight.T,
        "image/adapter/layer/feed_forward/down/bias": layer.linear2.bias,
        "image/adapter/layer/attention/query/kernel": queries.T.reshape(32, 2, 16),
        "image/adapter/layer/attention/key/kernel": keys.T.reshape(32, 2, 16),
        "image/adapter/layer/attention/value/kernel": values.T.reshape(32, 2, 16),
        "image/adapter/layer/attention/out/kernel": layer.self_attn.out_proj.weight.T.reshape(2, 16, 32),
        "image/adapter/layer/norm2/scale": layer.norm2.weight,
        **{f"special/{name.lower()}": vector for name, vector in special.items()},
    }.items():
        np.testing.assert_array_equal(bits(arrays[path]), bits(theirs.detach().contiguous()), err_msg=path)
    assert len(arrays) == 18 + 4 and set(map(part_of, arrays)) == {"image/adapter", "special"}


def test_training_starts_from_it(source):
    directory, module, special = source
    stored, arrays, tokenizer = load_trained(directory, C)
    assert stored == C and tokenizer is None
    holds(arrays, module, special)
    given, found = starting_point(
        TrainConfig(model=C, init_from=str(directory), tokenizer="omnifusion-tiny-decoder")
    )
    holds(given, module, special)
    assert found.name == "omnifusion-tiny-decoder"
    with pytest.raises(ConfigError, match="no tokenizer"):
        starting_point(TrainConfig(model=C, init_from=str(directory)))


def test_another_layout_than_the_original_is_refused_unless_the_files_say_it(source):
    directory, *_ = source
    ours = dataclasses.replace(C, layout="omnifusion")
    asked = TrainConfig(model=ours, init_from=str(directory), tokenizer="omnifusion-tiny-decoder")
    with pytest.raises(
        ConfigError, match=r"model\.layout: 'original' -> 'omnifusion'\n.*--config\.model\.layout=original"
    ):
        starting_point(asked)
    (directory / "omnifusion.json").write_text(json.dumps({"layout": "omnifusion"}))
    starting_point(asked)
    assert load_trained(directory, ours)[0] == ours


def test_another_model_is_refused_with_what_differs(source):
    directory, *_ = source
    message = (
        r"not of the model omnifusion-tiny: "
        r"decoder\.width is 48 there, 128 here; encoder\.width is 32 there, 128"
    )
    with pytest.raises(CheckpointError, match=message):
        load_trained(directory, preset("omnifusion-tiny"))
    other = changed(C, {"image.adapter": adapter("linear"), "layout": "text"})
    message = (
        r"adapter\.kind is transformer there, linear here; "
        r"special vectors is bot, eoi, soi, user there, eoi, soi"
    )
    with pytest.raises(CheckpointError, match=message):
        load_trained(directory, other)
    larger = changed(C, {"image.encoders[0].image_size": 32})
    with pytest.raises(
        CheckpointError, match="made for 9 rows a picture, the encoder of the model test gives 16"
    ):
        load_trained(directory, larger)
    heads = changed(C, {"image.adapter.heads": 4})
    assert load_trained(directory, heads)[0].image.adapter.heads == 2  # what the pickled module says
    with pytest.raises(ConfigError, match=r"--config\.model\.image\.adapter\.heads=2"):
        starting_point(
            TrainConfig(model=heads, init_from=str(directory), tokenizer="omnifusion-tiny-decoder")
        )
    (directory / "omnifusion.json").write_text(
        json.dumps({"layout": "original", "prompt": "Hi.\n", "image": {"fit": "pad"}})
    )
    stored = load_trained(directory, C)[0]
    assert (stored.layout, stored.prompt, stored.image.fit) == ("original", "Hi.\n", "pad")
    assert (C.prompt, C.image.fit) == (ModelConfig().prompt, "crop")  # what training asks for stays as it is


def test_training_starts_from_no_other_format(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"Convert this format first: .*--source=omnifusion-tiny "):
        load_trained("omnifusion-tiny", C)
    with pytest.raises(CheckpointError, match=r"a vision tower alone, .*--config\.parts_from\.image"):
        load_trained("omnifusion-tiny-encoder", C)
    (source[0] / "special_embeddings.pt").unlink()
    with pytest.raises(CheckpointError, match="a checkpoint of no known format"):
        load_trained(source[0], C)


def test_its_model_is_the_published_one_where_sizes_fit(tmp_path):
    module = models.VisualToGPTMapping(1024, 4096, 576, 4)
    write(tmp_path / "one", module, 4096)
    found = load_checkpoint(tmp_path / "one")
    assert found.config == dataclasses.replace(preset("omnifusion-1.1"), layout="original")
    assert (found.format, found.parts, found.tokenizer) == (
        "omnifusion-phase1",
        ("image/adapter", "special"),
        None,
    )
    assert sum(a.size for a in found.arrays.values()) == 12_598_272 + 4 * 4096
    for other, said in (
        ("report-siglip-b-mistral-7b", r"encoder\.width is 1024 there, 768"),
        ("omnifusion-1.1-mix", r"adapter\.kind is transformer"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(tmp_path / "one", preset=other)
    (tmp_path / "one/omnifusion.json").write_text(json.dumps({"preset": "omnifusion-tiny"}))
    with pytest.raises(CheckpointError, match=r"not of the model omnifusion-tiny: decoder\.width"):
        load_checkpoint(tmp_path / "one")  # what the file says, unless the user says otherwise
    assert load_checkpoint(tmp_path / "one", preset="omnifusion-1.1").arrays.keys() == found.arrays.keys()
    (tmp_path / "one/omnifusion.json").unlink()
    module.n_embeddings = 256  # of pictures of 224 pixels; the arrays are the same
    torch.save(module, tmp_path / "one/projection.pt")
    with pytest.raises(
        CheckpointError,
        match=r"made for 256 rows a picture, the encoder of the model omnifusion-1\.1 gives 576",
    ):
        load_checkpoint(tmp_path / "one")


def test_convert_asks_for_the_model_where_they_do_not(tmp_path):
    module = models.VisualToGPTMapping(128, 128, 36, 4, 256)
    special = write(tmp_path / "source", module, 128)
    sizes = (
        r"not of the model omnifusion-1\.1: decoder\.width is 128 there, 4096 here.*"
        r"--preset=NAME \(preset\), one of omnif"
    )
    with pytest.raises(CheckpointError, match=sizes):
        of.load(tmp_path / "source")
    with pytest.raises(
        CheckpointError,
        match=r"the format omnifusion-phase1 says itself what vision would; leave out --vision",
    ):
        load_checkpoint(tmp_path / "source", vision="omnifusion-tiny-encoder", preset="omnifusion-tiny")
    told = run_command(
        "convert", f"--source={tmp_path}/source", "--preset=omnifusion-tiny", f"--output={tmp_path}/native"
    )
    assert (
        "omnifusion-phase1, omnifusion-tiny" in told
        and "image/adapter           148,992 parameters\n" in told
    )
    found = load_checkpoint(tmp_path / "native")
    assert (found.format, found.missing) == ("native", ("image/encoders/0", "decoder"))
    assert found.config.image.encoders == preset("omnifusion-tiny").image.encoders
    np.testing.assert_array_equal(
        bits(found.arrays["image/adapter/linear/kernel"]), bits(module.linear.weight.T.contiguous())
    )
    np.testing.assert_array_equal(bits(found.arrays["special/soi"]), bits(special["SOI"]))
    assert inspect(tmp_path / "source", preset="omnifusion-tiny")[0] == "omnifusion-phase1"


@pytest.mark.parametrize("pickles", [True, False])
def test_what_phase_1_trained_is_written_so(source, tmp_path, pickles):
    directory, module, special = source
    stored, arrays, _ = load_trained(directory, C)
    save_native(tmp_path / "native", stored, arrays)
    export_original(load_checkpoint(tmp_path / "native"), tmp_path / "written", pickles=pickles)
    suffix = "pt" if pickles else "safetensors"
    assert {file.name for file in (tmp_path / "written").iterdir()} == {
        f"projection.{suffix}",
        f"special_embeddings.{suffix}",
        "omnifusion.json",
    }
    again, back, _ = load_trained(tmp_path / "written", C)
    assert again == stored
    holds(back, module, special)
    if pickles:
        loaded = torch.load(tmp_path / "written/projection.pt", weights_only=False)
        assert type(loaded) is models.VisualToGPTMapping and loaded.n_embeddings == 9
        x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
        assert torch.equal(loaded(x), module.eval()(x))
        vectors = torch.load(tmp_path / "written/special_embeddings.pt", weights_only=True)
        assert list(vectors) == list(NAMES) and all(
            torch.equal(vectors[name], special[name]) for name in NAMES
        )


def test_two_encoders(tmp_path, monkeypatch):
    """Not the original's, which published no code for them: what this library writes of such a phase 1."""
    [first] = C.image.encoders
    second = dataclasses.replace(first, image_size=16, width=16)
    c = changed(C, {"image.encoders": (first, second), "image.adapter": adapter("sum", width=16)})
    arrays = tiny.arrays(c, "image/adapter", "special")
    save_native(tmp_path / "native", c, arrays)
    export_original(load_checkpoint(tmp_path / "native"), tmp_path / "written", pickles=False)
    stored, back, _ = load_trained(tmp_path / "written", c)
    assert stored == c and back.keys() == arrays.keys()
    for path, a in arrays.items():
        np.testing.assert_array_equal(np.asarray(back[path]), a, err_msg=path)
    with pytest.raises(CheckpointError, match=r"adapter\.kind is sum there, transformer here"):
        load_trained(tmp_path / "written", C)

    # a reading of one's own, here with two vectors for one another
    monkeypatch.setitem(PRESETS, "two", lambda: copy.deepcopy(c))
    file = tmp_path / "written/projection.safetensors"
    reading = two_encoders.choose(two_encoders.divided(open_tensors(file), c), c, file)
    scale, bias = (f"image/adapter/mixes/0/norm/{name}" for name in ("scale", "bias"))
    reading[scale], reading[bias] = reading[bias], reading[scale]
    (tmp_path / "reading.json").write_text(json.dumps(reading))
    found = load_checkpoint(tmp_path / "written", preset="two", assign=tmp_path / "reading.json").arrays
    np.testing.assert_array_equal(np.asarray(found[scale]), arrays[bias])
    np.testing.assert_array_equal(np.asarray(found[bias]), arrays[scale])
