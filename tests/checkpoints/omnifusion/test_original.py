"""Directories laid out like the published OmniFusion release: import, native form, export, refusals."""

import dataclasses
import json
import os
import pickle
import shutil
import sys
import zipfile

import ml_dtypes
import models
import numpy as np
import pytest
import tiny
import torch
import transformers
from settings import changed

from omnifusion_jax.checkpoints.decoders import language_models
from omnifusion_jax.checkpoints.encoders import clip
from omnifusion_jax.checkpoints.load import load_checkpoint, load_decoder, load_encoder
from omnifusion_jax.checkpoints.mapping.shapes import shapes_of
from omnifusion_jax.checkpoints.mapping.tensors import to_foreign
from omnifusion_jax.checkpoints.native import save_native
from omnifusion_jax.checkpoints.omnifusion import original
from omnifusion_jax.checkpoints.omnifusion.export import export_original
from omnifusion_jax.checkpoints.storage.weights import open_tensors
from omnifusion_jax.errors import CheckpointError

C = tiny.config(layout="original")
CLIP_MODEL = {
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 99,
    }
}


def save_bin(model, directory):
    """As transformers 4 saves a large model without safetensors: two .bin files and their index."""
    names = list(model.state_dict())
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in shards.items():
        torch.save({name: model.state_dict()[name].clone() for name in part}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def bits(tensor):
    return (
        tensor.detach().view(torch.int16).numpy()
        if isinstance(tensor, torch.Tensor)
        else np.ascontiguousarray(tensor).view(np.int16)
    )


def same(named, expected):
    assert named.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(bits(named[name]), bits(expected[name]), err_msg=name)


def test_import_keeps_every_bit(source, built):
    found = load_checkpoint(source)
    assert found.format == "omnifusion"
    assert found.config == dataclasses.replace(C, preset="omnifusion-custom", layout="original")
    assert {path: a.shape for path, a in found.arrays.items()} == shapes_of(C)
    assert {a.dtype for a in found.arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    tensors = built[1].tensors()
    for part, table in (
        ("image/adapter", original.adapter_table(C)),
        ("special", original.SPECIAL_TABLE),
        ("decoder", language_models.table(C.decoder)),
    ):
        same(
            to_foreign({path: a for path, a in found.arrays.items() if path.startswith(f"{part}/")}, table),
            tensors[part],
        )


def test_the_pickled_module_says_what_a_state_dict_does_not(source):
    module = torch.load(source / "projection.pt", weights_only=False)
    layer = module.transformer_layer
    layer.self_attn.dropout = 0.25
    for norm in (layer.norm1, layer.norm2):
        norm.eps = 1e-3
    torch.save(module, source / "projection.pt")
    adapter = load_checkpoint(source).config.image.adapter
    assert (adapter.eps, adapter.dropout, adapter.heads) == (1e-3, 0.25, C.image.adapter.heads)


@pytest.mark.parametrize("pickles", [True, False])
def test_import_native_export_import_is_the_same_to_the_bit(source, built, tmp_path, pickles):
    first = load_checkpoint(source)
    save_native(tmp_path / "native", first.config, first.arrays, first.tokenizer)
    export_original(load_checkpoint(tmp_path / "native"), tmp_path / "exported", pickles=pickles)
    again = load_checkpoint(tmp_path / "exported")
    assert again.config == first.config
    same(again.arrays, first.arrays)
    assert not list(tmp_path.glob("*.unfinished"))


def test_what_is_exported_loads_where_the_original_code_runs(source, built, tmp_path):
    export_original(load_checkpoint(source), tmp_path / "exported")
    assert "models" not in sys.modules or sys.modules["models"] is models  # put back
    _, theirs = built
    adapter = torch.load(tmp_path / "exported/projection.pt", weights_only=False)
    assert type(adapter) is models.VisualToGPTMapping and not adapter.training
    same(adapter.state_dict(), theirs.adapter.state_dict())
    x = torch.randn(2, C.image.encoders[0].patches, C.image.encoders[0].width, dtype=torch.bfloat16)
    assert torch.equal(adapter(x), theirs.adapter.eval()(x))
    special = torch.load(tmp_path / "exported/special_embeddings.pt", weights_only=True)
    same(special, theirs.special)
    for cls, name, expected in (
        (transformers.MistralForCausalLM, "tuned-model", theirs.llm),
        (transformers.CLIPVisionModel, "clip", theirs.clip),
    ):
        module, report = cls.from_pretrained(tmp_path / "exported" / name, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        same(module.state_dict(), expected.state_dict())
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path / "exported/clip")
    assert processor.crop_size["height"] == C.image.encoders[0].image_size
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "exported/tokenizer").encode(
        "red", add_special_tokens=False
    )


def test_export_in_another_type(source, tmp_path):
    """Every tensor of every file, with the values that were there."""
    found = load_checkpoint(source)
    export_original(found, tmp_path / "exported", dtype="float32")
    files = ("tuned-model", "clip", "projection.pt", "special_embeddings.pt")
    assert {str(a.dtype) for name in files for a in open_tensors(tmp_path / "exported" / name).values()} == {
        "float32"
    }
    assert json.loads((tmp_path / "exported/tuned-model/config.json").read_text())["torch_dtype"] == "float32"
    again = load_checkpoint(tmp_path / "exported")
    for path, a in found.arrays.items():
        np.testing.assert_array_equal(again.arrays[path], np.asarray(a).astype(np.float32))


def test_import_in_another_type(source):
    assert {a.dtype for a in load_checkpoint(source, dtype="float32").arrays.values()} == {
        np.dtype(np.float32)
    }


def test_sharded_bin_files(source, built):
    save_bin(built[1].llm, source / "tuned-model")
    config, arrays, tokenizer = load_decoder(source / "tuned-model")
    assert config == C.decoder and tokenizer is None
    same(to_foreign(arrays, language_models.table(C.decoder)), built[1].llm.state_dict())
    (source / "tuned-model/pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"names pytorch_model-00002-of-00002.bin, which is missing"):
        load_checkpoint(source)


def test_a_whole_clip_model_with_its_text_tower(source, built):
    vision = built[1].clip
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=vision.config.to_dict(), **CLIP_MODEL)
    )
    whole.vision_model.load_state_dict(vision.state_dict())
    shutil.rmtree(source / "my-clip")
    whole.save_pretrained(source / "elsewhere/clip")
    config, arrays = load_encoder(source / "elsewhere/clip")
    assert config == C.image.encoders[0]
    assert {path: a.shape for path, a in arrays.items()} == shapes_of(C, "image/encoders/0")
    expected = {clip.PREFIX + name: t.float().to(torch.bfloat16) for name, t in vision.state_dict().items()}
    same(
        to_foreign(
            {path: a.astype(ml_dtypes.bfloat16) for path, a in arrays.items()},
            clip.CLIP.table(C.image.encoders[0]),
        ),
        expected,
    )
    shutil.move(source / "elsewhere/clip", source.parent / "given")
    with pytest.raises(
        CheckpointError, match=r"no vision models, as in the published release\. Pass vision \(--vision\)"
    ):
        load_checkpoint(source)
    assert load_checkpoint(source, vision=source.parent / "given").config.image.encoders == C.image.encoders


def test_the_published_repository_has_a_subfolder(source):
    for name in ("OmniMistral-v1_1", "OmniMistral-v1_1-encoders-mix"):
        shutil.copytree(source, source.parent / "hub" / name, ignore=shutil.ignore_patterns("my-clip"))
    shutil.move(source / "my-clip", source.parent / "hub/my-clip")
    assert load_checkpoint(source.parent / "hub").config.decoder == C.decoder
    shutil.copytree(source.parent / "hub/OmniMistral-v1_1", source.parent / "hub/again")
    with pytest.raises(CheckpointError, match="several models here"):
        load_checkpoint(source.parent / "hub")


def test_what_the_files_cannot_say_is_in_omnifusion_json(source):
    settings = {
        "layout": "omnifusion",
        "prompt": "Hi.\n",
        "preset": "mine",
        "adapter": {"heads": 2},
        "encoder": {"feature_layer": -1},
    }
    (source / "omnifusion.json").write_text(json.dumps(settings))
    config = load_checkpoint(source).config
    assert (config.layout, config.prompt, config.preset, config.image.encoders[0].feature_layer) == (
        "omnifusion",
        "Hi.\n",
        "mine",
        -1,
    )
    for change, said in (
        ({"adapter": {"heads": 4}}, r"adapter.heads is 4, the pickled adapter says 2"),
        ({"adapter": {"mlp": 4}}, r"unknown setting adapter.mlp"),
        ({"prompt": 3}, "prompt is 3, not of type str"),
    ):
        (source / "omnifusion.json").write_text(json.dumps(settings | change))
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(source)


def test_how_pictures_are_cut_goes_out_and_comes_in_again(source, tmp_path):
    """No published file says it; here each setting is another one than by default."""
    found = load_checkpoint(source)
    tiles = {"image.fit": "tiles", "image.unpad": True, "image.grids": ((2, 1), (1, 3))}
    config = changed(found.config, tiles | {"layout": "omnifusion", "image_place": "mark"})
    export_original(dataclasses.replace(found, config=config), tmp_path / "back", pickles=False)
    back = load_checkpoint(tmp_path / "back").config
    assert (back.image.fit, back.image.unpad, back.image.grids) == ("tiles", True, ((2, 1), (1, 3)))
    assert back.image_place == "mark"


def test_preprocessing_comes_from_the_clip_directory(source):
    file = source / "my-clip/preprocessor_config.json"
    file.write_text(
        json.dumps(
            {
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.2, 0.2, 0.2],
                "crop_size": 24,
                "size": {"shortest_edge": 24},
            }
        )
    )
    encoder = load_checkpoint(source).config.image.encoders[0]
    assert (encoder.mean, encoder.std) == ((0.5,) * 3, (0.2,) * 3)
    file.write_text(json.dumps({"crop_size": {"height": 30, "width": 30}}))
    with pytest.raises(CheckpointError, match=r"crop_size is \{'height': 30"):
        load_checkpoint(source)


def test_tensors_that_do_not_fit_are_all_named(source):
    tensors = dict(open_tensors(source / "projection.pt"))
    tensors["linear.weight"] = tensors["linear.weight"][:, :-1]
    tensors["norm3.weight"] = tensors.pop("linear.bias")
    torch.save(
        {name: torch.tensor(a.astype(np.float32)) for name, a in tensors.items()}, source / "projection.pt"
    )
    (source / "omnifusion.json").write_text('{"adapter": {"heads": 2}}')
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source)
    for line in (
        "projection.pt: 3 tensors",
        "linear.weight -> image/adapter/linear/kernel: has shape [48, 31]",
        "linear.bias -> image/adapter/linear/bias: missing",
    ):
        assert line in str(caught.value)
    assert "norm3.weight -> nowhere" in str(caught.value)


@pytest.mark.parametrize("name", ["projection", "special_embeddings", "tokenizer"])
def test_a_missing_file_is_named(source, name):
    gone = source / name
    shutil.rmtree(gone) if gone.is_dir() else gone.with_suffix(".pt").rename(source / "moved")
    if name == "projection":
        gone.with_suffix(".txt").touch()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(source)


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["projection.pt", "special_embeddings.pt", "tuned-model/pytorch_model.bin"])
def test_a_pickle_that_runs_code_is_refused(source, tmp_path, name):
    (source / "tuned-model/model.safetensors").unlink() if "tuned" in name else None
    with zipfile.ZipFile(source / name, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"USER": Hostile(tmp_path / "marker")}))
        archive.writestr("archive/version", "3")
    with pytest.raises(CheckpointError, match="which is not known to be safe; nothing was run"):
        load_checkpoint(source)
    assert not (tmp_path / "marker").exists()


def test_an_interrupted_export_leaves_nothing(source, tmp_path, monkeypatch):
    checkpoint = load_checkpoint(source)
    monkeypatch.setattr(
        "omnifusion_jax.checkpoints.omnifusion.export.write_encoder",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        export_original(checkpoint, tmp_path / "exported")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_part_of_a_model_is_not_exported(source, tmp_path):
    found = load_checkpoint(source)
    save_native(
        tmp_path / "phase1",
        found.config,
        {path: a for path, a in found.arrays.items() if path.startswith("image/adapter/")},
    )
    with pytest.raises(
        CheckpointError,
        match="holds only image/adapter; image/encoders/0, special, decoder of the model are missing",
    ):
        export_original(load_checkpoint(tmp_path / "phase1"), tmp_path / "exported")


def test_unknown_sources(tmp_path):
    with pytest.raises(CheckpointError, match=r"a checkpoint of no known format \(native: arrays/"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory, and not a Hugging Face id"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"nobody/nothing: .* Offline\? Download it elsewhere"):
        load_checkpoint("nobody/nothing")


def test_a_hub_id_is_downloaded_once_without_what_is_not_needed(source, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **patterns: asked.append((name, patterns["allow_patterns"])) or str(source),
    )
    assert load_checkpoint("org/name").format == "omnifusion"
    assert len(asked) == 1 and asked[0][0] == "org/name" and "*.bin" not in asked[0][1]
    for file in source.rglob("*.safetensors"):
        file.rename(file.with_suffix(".gone"))
    with pytest.raises(CheckpointError, match="no weights here"):
        load_checkpoint("org/name")
    assert "*.bin" in asked[-1][1]
